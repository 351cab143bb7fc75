"""Other projects' engines and harnesses over reduced models: docs/evaluation.md, docs/vllm.md.

The harnesses own tasks, datasets and scores. What is here loads a checkpoint, attaches to it and
answers; vLLM owns its models, which its plug-in puts ours in front of. Another project is imported
by its own package below, and by nothing else.
"""
