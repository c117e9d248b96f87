"""A model of the transformers library, built from memory: one call, and on a CPU nothing copied that need not be.

    model = load_model("/models/qwen3", "http://127.0.0.1:8470")

Its parameters are the segment's own pages, which all processes of the host share. What the library makes anew of a
checkpoint's tensors is a copy: experts that the checkpoint has one by one, and the library in one tensor a layer.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from shm.errors import InvalidInput
from transfer.client.loader import Loader


def load_model(directory: str | Path, url: str, *, kind: Any = None, **options: Any) -> Any:
    """What `kind.from_pretrained(directory, dtype="auto")` gives, from memory first; `options` go there too.

    `directory` has the checkpoint's config.json, and the files unless the nodes keep everything. `kind` is the model
    class: by default the one that config.json names. Parameters need no gradient and cannot be written, for they may
    lie on shared pages: writing into one in place ends the process. `.to(…)` of another dtype or device copies.

    Raises InvalidInput for a class that the library does not have, and RestoreError as a Loader does.
    """
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = kind if kind is not None else _kind_of(transformers, config, directory)
    with Loader(url, checkpoint=directory) as loader:
        model = kind.from_pretrained(None, config=config, state_dict=loader.load(), **{"dtype": "auto", **options})
    if (Path(directory) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.requires_grad_(False)


def _kind_of(transformers: Any, config: Any, directory: str | Path) -> Any:
    names = [str(name) for name in config.architectures or ()]
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if kind is None:
        raise InvalidInput(
            f"{directory}: config.json names the classes {names}, and transformers {transformers.__version__} has none "
            "of them: give the class, load_model(…, kind=…)"
        )
    return kind
