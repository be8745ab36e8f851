"""`python -m rigl_keras.kernels` builds the op library ahead of time."""

from rigl_keras.kernels import build_command

if __name__ == "__main__":
    build_command.main()
