"""How mask updates come to run within a training step.

step_update       `StepUpdate`, the callback that a method is a child of
graph_updates     the update in the graph of the training step
train_function    what `fit` exchanges in a model, and gives back
fit_runs          where a run of `fit` begins, and whether it still runs
masked_gradients  whether the gradients that an update goes by are dense
update_record     what the device remembers of updates
optimizer_state   momentum and its kin, of every optimizer of Keras
"""
