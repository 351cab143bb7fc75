"""Other projects' harnesses over models that attach() has been at; see docs/evaluation.md.

The harnesses own tasks, datasets and scores. What is here loads a checkpoint, attaches to it and
answers; a harness is imported by its own package below, and by nothing else.
"""
