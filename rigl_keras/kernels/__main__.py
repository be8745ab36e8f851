"""`python -m rigl_keras.kernels` builds the op library ahead of time."""

from rigl_keras.kernels import library

if __name__ == "__main__":
    library.main()
