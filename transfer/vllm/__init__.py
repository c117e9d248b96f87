"""vLLM's side: a load format that starts engines from memory, and experts loaded again while one is up.

`plugin` is what vLLM finds; `weights` what its loader is handed, and `model_loader` that loader; `reload` is for its
workers.
"""
