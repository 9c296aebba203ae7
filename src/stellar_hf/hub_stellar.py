# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The way to the Hub, and what goes there beside the weights: which class an Auto class loads, the model card."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `auto_map` says in the config.json of a folder that carries this code.
AUTO_MAP = {
    "AutoConfig": "configuration_stellar.StellarConfig",
    "AutoModel": "modeling_stellar.StellarModel",
    "AutoModelForPreTraining": "modeling_stellar.StellarForPreTraining",
    "AutoModelForImageClassification": "modeling_stellar.StellarForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_stellar.StellarForSemanticSegmentation",
    "AutoBackbone": "modeling_stellar.StellarBackbone",
}

_PIPELINE_TAGS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
}

_CARD = """
# {name}

[STELLAR](https://arxiv.org/abs/2602.01905) turns an image into a few sparse tokens S (what is there) and a
localization matrix L (where it is).

## How to load

```python
{usage}
```

## Model

{model}
"""

_SEAL = "\n<!-- Written by stellar_hf, which brings it up to date as long as nobody edits it: "


def modification_times(folder: str | os.PathLike) -> dict[str, int]:
    """When each file in a folder was last modified, in nanoseconds, by path in the folder; none if there is none."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def push_folder(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    repo_id: str,
    *,
    unless_modified: Mapping[str, int] | None = None,
    commit_message: str | None = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] | None = None,
) -> CommitInfo:
    """
    Uploads a folder that holds a model, with a model card that is written into it.

    Args:
        folder: Folder of the model.
        model: The model that the card describes.
        repo_id: Repository, as owner/name or the name alone; created if it does not exist.
        unless_modified: [`modification_times`] of files that are left out if they still have them; the card is not.
        commit_message, commit_description: What the commit says.
        private: Whether a new repository is private.
        token: Token for the repository; by default the one that is logged in.
        revision: Branch of the repository, created if it does not exist; the main one by default.
        create_pr: Whether to open a pull request.
        tags: Tags of the card beside those of every STELLAR model.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    write_model_card(folder, model, repo_id=repo_id, revision=revision, token=token, tags=tags)
    unchanged = (unless_modified or {}).items() & modification_times(folder).items()
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[path for path, _ in unchanged if path != "README.md"],
    )


def write_model_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    license: str = "apache-2.0",
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    dataset: str | None = None,
    dataset_ids: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, object] | None = None,
) -> None:
    """
    Writes README.md, a model card of what is known. One that a person wrote or edited, in the folder or in the
    repository, is never overwritten: the repository's is then copied to the folder.

    Args:
        folder: Folder of the model, which exists.
        model: The model that the card describes.
        name: Title of the card; by default the repository's, or the folder's, name.
        repo_id: Repository that the folder is for, as owner/name; `None` if there is none.
        revision: Branch of the repository; the main one by default.
        token: Token for the repository; by default the one that is logged in.
        license: Licence of the weights, as the Hub abbreviates it.
        language: As in the metadata of the Hub's model cards.
        tags: Tags beside those of every STELLAR model.
        base_model: Model that the training started from; by default the one that `model` was loaded from on the Hub.
        dataset: What the data of training and evaluation is called. Without it and `dataset_ids`, metrics are told
            in the text alone, since the Hub asks for their data set.
        dataset_ids: Data sets on the Hub, as owner/name.
        metrics: Results by name.
        training: Settings of the training by name.
    """
    path = Path(folder, "README.md")
    if path.exists() and not _is_ours(path.read_text(encoding="utf-8")):
        return
    on_hub = None if repo_id is None else _card_on_hub(repo_id, revision, token)
    if on_hub is not None and not _is_ours(on_hub):
        path.write_text(on_hub, encoding="utf-8")
        return

    name = name or (repo_id or Path(folder).absolute().name).split("/")[-1]
    location = repo_id or name
    base_model = base_model or _loaded_from(model, repo_id)
    auto_class = _auto_class(model)
    dataset = dataset or ", ".join(dataset_ids)
    metrics = metrics or {}
    results = _eval_results(metrics, dataset, dataset_ids, auto_class)
    data = ModelCardData(
        library_name="transformers",
        license=license,
        language=language,
        pipeline_tag=_PIPELINE_TAGS.get(auto_class, "image-feature-extraction"),
        tags=["stellar", "self-supervised", *tags],
        base_model=base_model,
        datasets=list(dataset_ids) or None,
        metrics=sorted({_metric_type(metric) for metric in metrics}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = _CARD.format(name=name, usage=_usage(model, auto_class, location), model=_table(_describe(model)))
    if base_model:
        text += f"\nIt started from [{base_model}](https://huggingface.co/{base_model}).\n"
    if dataset:
        text += f"\nData: {dataset}.\n"
    if training:
        text += f"\n## Training\n\n{_table(training)}\n"
    if metrics:
        text += f"\n## Results\n\n{_table({name: f'{value:.4g}' for name, value in metrics.items()})}\n"
    path.write_text(_sealed(str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))), encoding="utf-8")


# Whose card it is ----------------------------------------------------------------------------------------------------


def _sealed(content: str) -> str:
    """Ends a card with a comment that no longer fits once anything in the card is changed."""
    return f"{content}{_SEAL}{hashlib.sha256(content.encode()).hexdigest()[:16]} -->\n"


def _is_ours(content: str) -> bool:
    written, _, _ = content.rpartition(_SEAL)
    return content.strip() == _sealed(written).strip() or _is_placeholder(content)


def _is_placeholder(content: str) -> bool:
    """Whether it is the empty form that Transformers puts into a repository to which a processor is pushed first."""
    before, after = ModelCard.from_template(ModelCardData(), model_description="\0").text.strip().split("\0")
    _, _, rest = content.strip().partition(before)
    if not rest.endswith(after) or "automatically generated" not in rest.removesuffix(after):
        return False
    return ModelCard(content).data.to_dict().keys() <= {"library_name", "tags"}


def _card_on_hub(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    try:
        return Path(hf_hub_download(repo_id, "README.md", revision=revision, token=token)).read_text(encoding="utf-8")
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


# What it says --------------------------------------------------------------------------------------------------------


def _auto_class(model: PreTrainedModel) -> str:
    """The Auto class that a user of the model needs: for its head, or for the features alone."""
    names = {reference.split(".")[-1]: auto_class for auto_class, reference in AUTO_MAP.items()}
    auto_class = names.get(type(model).__name__, "AutoModel")
    return "AutoModel" if auto_class == "AutoModelForPreTraining" else auto_class


def _loaded_from(model: PreTrainedModel, repo_id: str | None) -> str | None:
    """The other repository that the model was loaded from, if any; never a local path."""
    source = model.name_or_path or ""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return source if on_hub and source != repo_id else None


def _usage(model: PreTrainedModel, auto_class: str, location: str) -> str:
    has_code = getattr(model.config, "auto_map", None) is not None
    arguments = f'"{location}"' + (", trust_remote_code=True" if has_code else "")
    lines = [
        f"from transformers import AutoImageProcessor, {auto_class}",
        "",
        f"model = {auto_class}.from_pretrained({arguments})",
        f"processor = AutoImageProcessor.from_pretrained({arguments})",
        'outputs = model(**processor(image, return_tensors="pt"))',
    ]
    if not has_code:
        lines.insert(0, "import stellar_hf  # makes the Auto classes know STELLAR")
    if auto_class == "AutoModel":
        config = model.config
        tokens, patches = config.num_sparse_tokens, (config.image_size // config.patch_size) ** 2
        lines.append(f"outputs.sparse_tokens  # (1, {tokens}, {config.hidden_size}): what")
        lines.append(f"outputs.localization  # (1, {patches}, {tokens}): where; rows sum to 1")
    return "\n".join(lines)


def _describe(model: PreTrainedModel) -> dict[str, object]:
    config = model.config
    return {
        "Class": f"`{type(model).__name__}`",
        "Parameters": f"{model.num_parameters():,}",
        "Image size": config.image_size,
        "Patch size": config.patch_size,
        "Sparse tokens": config.num_sparse_tokens,
        "Hidden size": config.hidden_size,
        "Layers": config.num_hidden_layers,
        "Attention heads": config.num_attention_heads,
        "Reconstruction target": config.reconstruction_target,
        "Prototypes": config.num_prototypes,
    }


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _metric_type(name: str) -> str:
    """The kind of a metric by the last word of its name: `test_knn_accuracy` is an accuracy."""
    last = name.split("_")[-1]
    return {"miou": "mean_iou"}.get(last, last)


def _eval_results(
    metrics: Mapping[str, float], dataset: str, dataset_ids: Sequence[str], auto_class: str
) -> list[EvalResult]:
    if not dataset:
        return []
    return [
        EvalResult(
            task_type=_PIPELINE_TAGS.get(auto_class, "image-feature-extraction"),
            dataset_type=dataset_ids[0] if dataset_ids else dataset.replace(" ", "-"),
            dataset_name=dataset,
            metric_type=_metric_type(name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
