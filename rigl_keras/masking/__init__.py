"""Masked models: `sparsify`, the layers that hold masks, and copies of models.

sparsify        `sparsify`, `with_masks`
stripping       `strip`
masked          `Masked`, the wrapper that holds the mask of a layer
masked_layers   the masked layers of a model, as a table
selection       which kernels to mask
mask_drawing    draws all masks; `drawing` draws one
kernel_part     some entries of a kernel and its mask, for all of them
layer_kernels   which variables of a layer are kernels
model_tree      the parts of a model; `leaves`, its innermost layers
surgery         exchanges layers within a model
layer_state     what a copied layer keeps besides its weights
tracing         how a masked layer reads its kernel, in every graph
mask_variable   a mask as a variable: zeros and ones only
weight_files    `load_weights`
"""
