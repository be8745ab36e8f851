"""Models for inference: formats, comparison with the model, and a report.

export              `export`
formats             the registry of formats
base_format         `Format`: what each format provides
saved_model, sparse_saved_model, native, tflite, onnx, keras_file
preconditions       checks before anything is written
comparison          whether the artefact computes what the model does
measurement         its size and speed
export_report       `ExportReport`, `check_export`
signatures          inputs and outputs of a served model
networks            a model as networks, for sparse_saved_model and native
sparse_storage      kernels stored without their zeros
"""
