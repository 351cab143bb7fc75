"""What every test run shares: one thread, no network, no chatter."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from importlib.metadata import version

import torch

torch.set_num_threads(1)

# generate() takes position_ids since 5.3. Before, prepare_inputs is tested to be refused.
takes_positions = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 3)
collect_ignore = [f"test_hf_prepare_inputs{'_refused' if takes_positions else ''}.py"]
