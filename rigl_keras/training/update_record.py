"""What the device remembers of updates until the host fetches it."""

__all__ = ["APPLIED_TWICE", "NOT_DENSE", "NOT_FINITE", "REASONS", "TWICE"]

# Why an update was refused: the device notes the index.
NOT_FINITE, NOT_DENSE, APPLIED_TWICE = range(3)
REASONS = (
    "the gradient of a masked kernel, or the kernel, was NaN or infinite, or "
    "a score was NaN. The masks are unchanged. Where training has diverged, "
    "lower the learning rate or clip gradients, and resume from a checkpoint "
    "before this step.",
    "every gradient of {layers} was exactly zero where the mask is zero, so "
    "that there is nothing to grow by. The masks are unchanged. Call the model "
    "within `with rigl_keras.dense_gradients():`, around the gradient tape. A "
    "tf.function that was traced outside of it stays as it was traced.",
    "the training step applied its optimizer more than once, and masks may "
    "have changed each time. {twice}",
)
TWICE = (
    "Make the method with end_step, call attach(model, optimizer), and in the "
    "training step update(gradients, variables) in place of each "
    "optimizer.apply: so each is judged by its own step. Leave it out of "
    "fit's callbacks then."
)
