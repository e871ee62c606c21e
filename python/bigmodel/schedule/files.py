"""Problems as TOML and JSON. The keys are the fields of problem.py; what has its default is not written."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.schedule.problem import Job, Objective, Pool, Problem, Rate, Running

# Fields that hold further dataclasses, and whether they hold many.
_NESTED = {
    (Problem, "pools"): (Pool, True),
    (Problem, "jobs"): (Job, True),
    (Problem, "objective"): (Objective, False),
    (Job, "throughput"): (Rate, True),
    (Job, "running"): (Running, False),
}
_TUPLES = {"after", "counts", "order"}


def load(path: str | Path) -> Problem:
    """Reads a problem from a .toml or .json file; relative CSV paths in it start at its folder.

    Raises:
        OSError: the file cannot be read. ValueError: it is no TOML or JSON, has a key twice, or is no valid problem;
            one sentence.
    """
    path = Path(path)
    return from_dict(read(path, "a problem"), folder=str(path.parent))


def read(path: Path, what: str) -> Any:
    """The data of a .toml or .json file, which holds `what`."""
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path}: {what} is a .toml or a .json file.")
    try:
        text = path.read_text(encoding="utf-8")
        return iso(json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else toml().loads(text))
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; that a key comes twice is an error, as in TOML."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} comes twice in one object")
        table[key] = value
    return table


def toml() -> Any:
    """tomllib, or on Python 3.10 tomli, which has the same functions."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli

    return tomli


def dump(problem: Problem, path: str | Path) -> None:
    """Writes a problem to a .toml or .json file that `load` reads back equal; columns of CSV files as their values."""
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(to_dict(problem), indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".toml":
        import tomli_w

        path.write_text(tomli_w.dumps(to_dict(problem)), encoding="utf-8")
    else:
        raise ValueError(f"{path}: a problem is a .toml or a .json file.")


def example() -> str:
    """The text of a problem to start from: a week of hourly slots, four pools, ten jobs."""
    return resources.files("bigmodel.schedule").joinpath("plan_week.toml").read_text()


def from_dict(data: dict[str, Any], folder: str = ".") -> Problem:
    return build(Problem, data, "", folder=folder)


def to_dict(value: Problem | Objective) -> dict[str, Any]:
    """What `from_dict` reads from any folder: a column of a CSV file becomes its value in each slot."""
    return _plain(_self_contained(value) if isinstance(value, Problem) else value)


def _self_contained(problem: Problem) -> Problem:
    tables = {"count": problem.count, "price": problem.price, "carbon": problem.grams}
    pools = []
    for p, pool in enumerate(problem.pools):
        given = {name: getattr(pool, name) for name in tables}
        columns = [name for name, value in given.items() if isinstance(value, dict) and "csv" in value]
        written: dict[str, Any] = {name: {"slots": tables[name][p].tolist()} for name in columns}
        pools.append(dataclasses.replace(pool, **written))
    return dataclasses.replace(problem, pools=tuple(pools))


def build(kind: type, data: Any, path: str, **more: Any) -> Any:
    """A dataclass of problem.py from a table of its fields; `path` is where the table stands."""
    here = path or "the problem"
    if not isinstance(data, dict):
        raise ValueError(f"{here}: must be a table, got {data!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "folder"}
    for key in data:
        if key not in fields:
            raise ValueError(f"{_join(path, key)}: is no field; known are {', '.join(fields)}.")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(kind, name, data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(path, name)}: is missing.")
    return kind(**values, **more)


def _value(kind: type, name: str, value: Any, path: str) -> Any:
    if (kind, name) in _NESTED:
        inner, many = _NESTED[kind, name]
        if not many:
            return build(inner, value, path)
        if not isinstance(value, list):
            raise ValueError(f"{path}: must be a list of tables, got {value!r}.")
        return tuple(build(inner, item, f"{path}[{index}]") for index, item in enumerate(value))
    if name in _TUPLES:
        if not isinstance(value, list):
            raise ValueError(f"{path}: must be a list, got {value!r}.")
        return tuple(value)
    if name in ("quotas", "budgets", "env", "weights") and not isinstance(value, dict):
        raise ValueError(f"{path}: must be a table, got {value!r}.")
    return iso(value)


def iso(value: Any) -> Any:
    """TOML has dates of its own; here times are ISO text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, list):
        return [iso(item) for item in value]
    if isinstance(value, dict):
        return {key: iso(item) for key, item in value.items()}
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [field for field in dataclasses.fields(value) if field.name != "folder"]
        pairs = [(field, getattr(value, field.name)) for field in fields]
        return {field.name: _plain(item) for field, item in pairs if not _is_default(field, item)}
    if isinstance(value, np.ndarray):
        return {"slots": value.tolist()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if isinstance(value, np.ndarray):
        return False
    return value is None or (type(value) is type(default) and value == default)
