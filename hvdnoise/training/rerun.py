"""The weights of an earlier run, and scoring them: `hvdnoise eval`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from hvdnoise.comm import World
from hvdnoise.training import checkpoint, data, models, plugins
from hvdnoise.training.agreement import agree_on_data
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.evaluate import evaluate
from hvdnoise.training.options import from_file
from hvdnoise.training.progress import log
from hvdnoise.training.runfolder import call_or_raise
from hvdnoise.training.weights import FILES, read


@one_line_errors()
def find(run: str, which: str, data_root: str | None, *, trust: bool = False
         ) -> tuple[TrainConfig, Path]:
    """The settings of a run, but its noise, and the file of the weights asked for.

    The run's plugins are not imported: a run folder is data, and scoring needs no noise.

    Args:
        trust: import the functions that the run names as its data set and its model.

    Raises:
        ConfigError: when there is no such run or file, or when it needs code and is not trusted.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run={run or '(none)'} holds no config.yaml: give the folder of a run")
    config = from_file(TrainConfig, folder / "config.yaml", program="hvdnoise eval",
                       without=("noise", "plugins"))
    weights = folder / FILES[which] if which in FILES else Path(which)
    if weights.is_dir():
        weights = weights / "shared.pt"
    if not weights.is_file():
        others = [str(path) for path in checkpoint.found(folder / "checkpoints")]
        others += [name for name, file in FILES.items() if (folder / file).is_file()]
        raise ConfigError(f"checkpoint={which}: there is no {weights}; there are: "
                          f"{', '.join(others) or 'none'}")
    named = plugins.function_names(vars(config))
    if named and not trust:
        text = " and ".join(f"{flag}={name}" for flag, name in named.items())
        raise ConfigError(f"run={run} was made with {text}: code, which may come from wherever the "
                          "run does; look at it, and add --trust_plugins")
    plugins.load_functions(config)
    if data_root is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=data_root))
    return config, weights


def restore(config: TrainConfig, weights: Path, device: torch.device
            ) -> tuple[data.Datasets, torch.nn.Module]:
    """The data sets of a run, which `data.prepare` has made ready, and its model with ``weights``.

    Raises:
        ValueError: when there are no such weights or data, or the weights are damaged, not finite,
            or do not fit.
    """
    datasets = data.build(config.data, seed=config.seed)
    return datasets, network(config, weights, datasets.spec).to(device)


def network(config: TrainConfig, weights: Path, spec: data.DataSpec) -> torch.nn.Module:
    """The model of a run with ``weights``, on the CPU. Raises as `restore`."""
    model = models.build_for(config.model, spec, norm=config.norm)
    state = read(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{weights} does not fit the model {config.model}: {text}") from error
    return model


def agree(datasets: data.Datasets, config: TrainConfig, device: torch.device, world: World
          ) -> None:
    """See that all ranks have the same data, where nothing has checked the files. Collective.

    Raises:
        ConfigError: on all ranks, where they have not.
    """
    if config.data.record.own:
        agree_on_data(datasets, config.data, device, world)


def score(config: TrainConfig, weights: Path, world: World, device: torch.device, *,
          batch_size: int) -> int:
    """Score, and say the result on one line. Collective."""
    data.prepare(config.data, world)
    datasets, model = call_or_raise(world, lambda: restore(config, weights, device))
    agree(datasets, config, device, world)
    batches = data.eval_loader(datasets.test, size=world.size, rank=world.rank,
                               batch_size=batch_size)
    found = evaluate(model, batches, world, device)
    if not math.isfinite(found.loss):
        raise ConfigError(f"the loss of {weights} is {found.loss} on the test images, so there is "
                          "no score: give another --checkpoint")
    log.info("test accuracy %.4f  test loss %.4f  on %d examples of %s, weights %s",
             found.accuracy, found.loss, found.count, config.data.dataset, weights)
    return 0
