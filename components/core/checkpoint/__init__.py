"""The checkpoint contract: an ordinary Hugging Face folder, checked, loaded and saved here. `files` does not need torch.

`AutoModelForCausalLM.from_pretrained` loads the folder without any code from this project; a checkpoint quantized by
optimum-quanto needs `QuantizedModelForCausalLM.from_pretrained`, one in a packed format
`components.core.packed`. See `components.core.history` for its `compression.json`.
"""
