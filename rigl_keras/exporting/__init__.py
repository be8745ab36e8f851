"""Models for inference: formats, comparison with the model, and a report.

export              `export`
formats             the registry: how each format is written and loaded
comparison          whether what was written computes what the model does
measurement         its size and speed
export_report       `ExportReport`, `check_export`
signatures          what a served model takes and returns
saved_model, sparse_saved_model, tflite, onnx
fusion              a network as sparse steps, for sparse_saved_model
sparse_storage      kernels with their zeros left out
"""
