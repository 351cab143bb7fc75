"""The lmms-eval plug-in: `python -m lmms_eval --model restore_ext --model_args ...`.

lmms-eval asks the entry points of its group `lmms_eval.models` for manifests. It does so with every
run, whatever the model, so nothing heavy is imported here.
"""

from typing import Any

NAME = "restore_ext"
INSTALL = "pip install lmms_eval"


def manifest() -> Any:
    """lmms-eval's ModelManifest of our model, for conversations and, under --force_simple, for
    tasks by likelihood.

    raises  ImportError: lmms-eval is missing, or has no manifests (before 0.7)
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError(f"the plug-in needs lmms_eval, 0.7 or newer: {INSTALL}") from error
    return ModelManifest(
        model_id=NAME,
        chat_class_path=f"{__name__}.model.RestoreExt",
        simple_class_path=f"{__name__}.model.RestoreExtSimple",
    )
