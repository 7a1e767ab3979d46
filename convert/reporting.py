"""Where what training logs is shown while it runs: transformers' integrations, named by a recipe's `report_to`."""

import importlib.util
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Those that are a module, or come in a package, of another name.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
PACKAGES |= {name: f"'linearize[{name}]'" for name in ("tensorboard", "trackio")}


def check_reporting(names: list[str]) -> None:
    """Raises ValueError: there is no such integration, or what it needs is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to: transformers has no integration {name}; it has {known}")
        if importlib.util.find_spec(MODULES.get(name, name)) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {PACKAGES.get(name, name)}")


class TensorBoard(TensorBoardCallback):
    """transformers' own, in a directory that outlives checkpoints; what an interrupted run had logged behind its last
    one is taken back."""

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(str(self.directory), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


def reporters(names: list[str], directory: Path) -> list[TrainerCallback | type[TrainerCallback]]:
    """Callbacks for Trainer.

    Args:
        directory: for those that write files by themselves.
    """
    return [TensorBoard(directory) if name == "tensorboard" else INTEGRATION_TO_CALLBACK[name] for name in names]
