"""ONNX export of KurTail artefacts: graph building, a runner for ONNX Runtime, and the proof that both agree."""
