"""Models in forms that other tools load: ONNX, torch.export, safetensors, Hugging Face.

`export` is the job. Each format has a file with one function, which writes a folder and compares what it wrote with the
model.
"""
