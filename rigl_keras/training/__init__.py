"""How mask updates come to run within a training step.

step_update       `StepUpdate`, the callback that methods are subclasses of
method_hooks      what a method defines: when masks change, and how
attachment        what is trained: model, optimizer, masked layers
graph_updates     the update in the graph of the training step
dense_gradients   the gradients that an update goes by, of one batch or several
gradient_exchange which gradients travel between replicas
update_record     what the device notes of updates, and the host reads
train_function    what `fit` exchanges in a model, and gives back
fit_runs          where a run of `fit` begins, and whether it still runs
optimizer_state   momentum and its kin, of every optimizer of Keras
"""
