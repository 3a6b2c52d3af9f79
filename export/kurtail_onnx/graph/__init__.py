"""From an artefact folder to an ONNX graph; one file a part of the model, nothing here runs a graph."""
