"""The checkpoint contract: an ordinary Hugging Face folder, checked, loaded and saved here. `files` needs no torch.

`AutoModelForCausalLM.from_pretrained` loads the folder with no code of ours; one quantized by optimum-quanto is loaded by
`QuantizedModelForCausalLM.from_pretrained`. Its `compression.json` is the subject of `components.core.history`.
"""
