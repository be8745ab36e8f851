"""How mask updates run within a training step.

step_update       `StepUpdate`, the callback that methods subclass
method_hooks      what a method defines: when masks change, and how
attachment        the model, optimizer and masked layers in training
graph_updates     the update in the graph of the training step
dense_gradients   the gradients of an update, from one batch or several
gradient_exchange which gradients travel between replicas
update_record     records of updates, from the device to the host
train_function    the methods of a model that `fit` replaces and restores
fit_runs          where a run of `fit` begins, and whether it still runs
optimizer_state   the memory (momentum) of all Keras optimizers
"""
