"""What a reproduction starts: the settings of the record, and ranks on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hvdnoise.plans import with_group_size
from hvdnoise.reproduce.config import ReproduceConfig
from hvdnoise.reproduce.record import Record, plugin_digest, plugin_file
from hvdnoise.study import launch
from hvdnoise.study.config import StudyConfig
from hvdnoise.training import plugins
from hvdnoise.training.arguments import several_noises
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.options import reader
from hvdnoise.training.origin import is_variable
from hvdnoise.training.validation import validate

_LAUNCHERS: dict[str, Literal["mpirun", "torchrun", "horovodrun"]] = {
    "mpi": "mpirun", "torch": "torchrun", "gloo": "horovodrun"}  # by transport


def words(config: ReproduceConfig, record: Record) -> list[str]:
    """The command, below its guard."""
    flags = [f"--config={record.folder / 'config.yaml'}"]
    flags += [f"--{name}={value}" for name, value in changed(config, record).items()]
    return launch.command(_as_study(record), flags, config.folder)


def environment(record: Record) -> dict[str, str]:
    """The variables of the ranks: those here, but of those that may change bits the record's."""
    found = launch.environment(_as_study(record), [])
    return {**{name: value for name, value in found.items() if not is_variable(name)},
            **record.variables}


def _as_study(record: Record) -> StudyConfig:
    return StudyConfig(ranks=record.ranks, threads=record.threads, slurm="no",
                       launcher=_LAUNCHERS[record.transport])


def changed(config: ReproduceConfig, record: Record) -> dict[str, Any]:
    """The settings that are others than in config.yaml, by flag; none changes a bit.

    Where the run had several hosts, groups of its exchange were within each of them.
    """
    here: dict[str, Any] = {
        "run_dir": config.folder, "resume": "never", "resume_resize": "false",
        "overwrite": str(config.overwrite).lower(), "threads": record.threads,
        "device": record.device}
    if config.data_root is not None:
        here["data.root"] = config.data_root
    local, exchange = record.environment.get("local_size"), record.settings.get("exchange")
    if isinstance(local, int) and isinstance(exchange, str) and local != record.ranks:
        if with_group_size(exchange, local) != exchange:
            here["exchange"] = with_group_size(exchange, local)
    return here


@one_line_errors()
def check(config: ReproduceConfig, record: Record) -> None:
    """Import the plugins, check the settings as the ranks will, and make the data ready.

    Raises:
        ConfigError: one line, for what is wrong or missing here; nothing was created.
    """
    for plugin in record.plugins:
        if plugin_file(plugin) is None:
            raise ConfigError(f"the run's plugin {plugin} is missing here: start from the folder "
                              f"that has it (the run's was {record.environment.get('folder')})")
    if record.plugins and not config.trust_plugins:
        files = ", ".join(describe(record, plugin) for plugin in record.plugins)
        raise ConfigError(f"the run imports {files}: code, which may come from wherever "
                          "the run does; look at it, and add --trust_plugins")
    plugins.load(record.plugins)
    trained = _settings(config, record)
    plugins.load_functions(trained)
    validate(trained, record.ranks)
    trained.data.record.prepare(trained.data)


def describe(record: Record, plugin: str) -> str:
    """Which file it is, and whether it is the recorded one."""
    versions, found = record.environment.get("versions"), plugin_digest(plugin)
    recorded = versions.get(f"plugin {plugin}") if isinstance(versions, dict) else None
    if found is None:
        return "missing here"
    state = "as recorded" if found == recorded else f"not as recorded, {found} for {recorded}"
    return f"{plugin_file(plugin)} ({state})"


def _settings(config: ReproduceConfig, record: Record) -> TrainConfig:
    """The settings of the new run, as the ranks will read them."""
    read = reader(TrainConfig, program="hvdnoise reproduce")
    try:
        trained = read(several_noises(record.settings))
    except ConfigError as error:
        raise ConfigError(f"{record.folder / 'config.yaml'}: {error}") from error
    here = changed(config, record)
    root = Path(config.data_root) if config.data_root is not None else trained.data.root
    return replace(trained, run_dir=str(config.folder), resume="never", resume_resize=False,
                   overwrite=config.overwrite, threads=record.threads, device=here["device"],
                   exchange=here.get("exchange", trained.exchange),
                   data=replace(trained.data, root=str(root)))
