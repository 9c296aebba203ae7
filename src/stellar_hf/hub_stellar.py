# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Saving and pushing of models: which class an Auto class loads, permissions of files, the model card."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from .released_stellar import PUBLISHED_RESULTS, RELEASED_LICENSE, RELEASED_REPOSITORY

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
    "StellarPipeline": "image-to-image",
    "StellarTokenPriorPipeline": "unconditional-image-generation",
}

# The metrics at https://huggingface.co/metrics that results are in, by the end of a result's name.
_METRIC_IDS = {
    "accuracy": "accuracy",
    "own_material_knn": "accuracy",
    "miou": "mean_iou",
    "mean_best_overlap": "mean_iou",
}

_IMAGENET = "ILSVRC/imagenet-1k"

# In the folder of a model, drawn by a training or a conversion; the card shows it.
FIGURE_NAME = "reconstructions.png"

# In Jinja. Here and not in a file of its own, which would not come along as remote code.
_CARD = """\
---
{{ card_data }}
---

# {{ name }}

[STELLAR](https://arxiv.org/abs/2602.01905) turns an image into a few sparse tokens S (what is there) and a
localization matrix L (where it is).
{% if released %}
The weights are the authors' `{{ released }}` of [{{ base_model }}](https://huggingface.co/{{ base_model }}). They
pre-trained it on ImageNet-1k, from MAE weights; stellar_hf converted it for Transformers and Diffusers.
{% endif %}{% if figure %}
![Images, their reconstructions from the tokens, and the tokens' maps]({{ figure }})
{% endif %}
## How to load
{% if has_processor %}
```python
{% if not has_code %}import stellar_hf  # makes the Auto classes know STELLAR
{% endif -%}
from PIL import Image
from transformers import AutoImageProcessor, {{ auto_class }}

image = Image.open("photograph.jpg")  # one of yours
model = {{ auto_class }}.from_pretrained({{ arguments }})
processor = AutoImageProcessor.from_pretrained({{ processor_arguments }})
outputs = model(**processor(image, return_tensors="pt"))
{% if auto_class == "AutoModel" -%}
outputs.sparse_tokens  # (1, {{ config.num_sparse_tokens }}, {{ config.hidden_size }}): what
outputs.localization  # (1, {{ num_patches }}, {{ config.num_sparse_tokens }}): where; rows sum to 1
{% endif -%}
```
{% endif %}{% if has_code %}
Transformers is all that this needs: the code comes with the weights, and `trust_remote_code=True` lets it run.
{% endif %}{% if decoding %}
From images to tokens and back, with Diffusers:

```python
{{ decoding }}
tokens, localization = pipe.encode(image)  # to be edited, moved, mixed
pipe(sparse_tokens=tokens, localization=localization).images[0]
```
{% endif %}{% if draws %}
Images drawn from noise:

```python
from stellar_hf import {{ pipeline }}

pipe = {{ pipeline }}.from_pretrained("{{ address }}")
pipe([None] * 4).images  # of any class; or names or numbers of classes
```
{% endif %}{% if decoding or not has_code %}
The package stellar_hf is on no index yet: `pip install FOLDER`, with the folder of its source, installs it.
{% endif %}
## Model

| | |
|---|---|
{% if pipeline %}| Pipeline | `{{ pipeline }}` |
{% endif -%}
| Class | `{{ class_name }}` |
| Parameters | {{ num_parameters }} |
| Image size | {{ config.image_size }} |
| Patch size | {{ config.patch_size }} |
| Sparse tokens | {{ config.num_sparse_tokens }} |
| Hidden size | {{ config.hidden_size }} |
| Layers | {{ config.num_hidden_layers }} |
| Attention heads | {{ config.num_attention_heads }} |
| Reconstruction target | {{ config.reconstruction_target }} |
| Prototypes | {{ config.num_prototypes }} |
{% if base_model and not released %}
It started from [{{ base_model }}](https://huggingface.co/{{ base_model }}).
{% endif %}{% if data %}
Data: {{ data }}.
{% endif %}{% if training %}
## Training

| | |
|---|---|
{% for name, value in training.items() %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if results %}
## Results

| | this model |{% for baseline in baselines %} {{ baseline }} |{% endfor %}
|---|---|{% for baseline in baselines %}---|{% endfor %}
{% for name, value in results.items() %}| {{ name }} | {{ "%.4g" % value }} |
{%- for values in baselines.values() %} {{ "%.4g" % values[name] if name in values else "–" }} |{% endfor %}
{% endfor %}{% endif %}{% if released %}
## Results as published

By the authors on ImageNet-1k ([Table 1](https://arxiv.org/abs/2602.01905)); nothing was measured with these files.

| | tokens | linear probe, % | kNN, % | rFID | LPIPS |
|---|---|---|---|---|---|
{% for model, tokens, linear, knn, fid, lpips in published -%}
| {{ model }} | {{ tokens }} | {{ "%.2f" % linear }} | {{ "%.2f" % knn }} |
{%- if fid %} {{ "%.2f" % fid }} | {{ "%.4f" % lpips }} |{% else %} – | – |{% endif %}
{% endfor %}
{% if not is_published %}There is no row of `{{ released }}`. {% endif -%}
rFID and LPIPS of STELLAR B are those of a decoder that was trained separately, which was not released.
{% endif %}
## Limits

- Tokens are what the training found useful to tell apart: often objects or their parts, but neither is sure, and they
  have no names.
- Few tokens leave out detail: a reconstruction shows what and where, not every pixel.
- Images other than the training's, in kind, size or quality, may be told apart less well. Measure it on your own.
- What is rare or one-sided in the training's images is so in the tokens.

Do not use it to recognize or judge people, for decisions that can harm somebody without checks of your own, or to pass
off edited or reconstructed images as photographs.

## License and citation

Weights: `{{ license }}`.{% if has_code %} The code beside them: `apache-2.0`.{% endif %}
{%- if released and decoding %} The tokenizer in `vq_model` is that of
[fun-research/TiTok](https://huggingface.co/fun-research/TiTok), under the licence of that repository.{% endif %}

If you use STELLAR, cite the paper:

```bibtex
@inproceedings{zhao2026stellar,
  title     = {Learning Sparse Visual Representations via Spatial-Semantic Factorization},
  author    = {Zhao, Theodore Zhengde and Kiblawi, Sid and Yang, Jianwei and Usuyama, Naoto and Tan, Reuben and
               Codella, Noel C and Naumann, Tristan and Poon, Hoifung and Wei, Mu},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  url       = {https://arxiv.org/abs/2602.01905},
}
```
"""

# How the card makes the variable `pipe`: of a repository that is a pipeline, too, and of a model alone.
_LOADED_PIPELINE = """\
from stellar_hf import StellarPipeline

pipe = StellarPipeline.from_pretrained("{name}")"""
_BUILT_PIPELINE = """\
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline

pipe = StellarPipeline(
    image_processor=StellarImageProcessorPil.from_pretrained("{name}"),
    model=StellarForImageReconstruction.from_pretrained("{name}"),
)"""

# The last line of a card of ours, with a hash of the lines before: the only way to tell an edited card from one that
# was made of other figures.
_SEAL = "\n<!-- Written by stellar_hf, which brings it up to date as long as nobody edits it: "

# The texts of the forms that Transformers and Diffusers put into a repository to which a processor or another
# component is pushed first.
_FORMS = tuple(
    f"This is the model card of a {what} that has been pushed on the Hub. This model card has been automatically "
    "generated."
    for what in ("🤗 transformers model", "🧨 diffusers model", "🧨 diffusers pipeline")
)
_METADATA_OF_FORM = re.compile(r"---\nlibrary_name: (transformers|diffusers)\n(tags:( \[\])?\n(- .*\n)*)?---\s*")


class StellarHubMixin:
    """Saving and pushing of a model, with its code where that was asked for, and with a model card."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """
        As in `PreTrainedModel`. A class on which `register_for_auto_class` was called saves its code, too, and every
        Auto class then loads the folder with `trust_remote_code=True`, on a machine without this package.

        With `push_to_hub=True`, what was written is pushed as by [`~StellarHubMixin.push_to_hub`], whose arguments
        are taken, too; `repo_id` is the folder's name by default.
        """
        model: Any = self
        # Named in the signature, where a pipeline of Diffusers looks for what it may pass on.
        kwargs |= {"max_shard_size": max_shard_size, "variant": variant}
        if model.is_remote_code():
            model.config.auto_map = dict(AUTO_MAP)
        elif hasattr(model.config, "auto_map"):
            del model.config.auto_map  # of the folder it was loaded from: the code does not come along
        save: Any = super().save_pretrained  # type: ignore[misc]
        of_saving = inspect.signature(save).parameters
        of_hub = {name: kwargs.pop(name) for name in [*kwargs] if push_to_hub and name not in of_saving}
        before = _modification_times(save_directory)
        save(save_directory, **kwargs)
        apply_umask(save_directory)
        if push_to_hub and kwargs.get("is_main_process", True):
            repo_id = of_hub.pop("repo_id", Path(save_directory).absolute().name)
            written = [path for path, time in _modification_times(save_directory).items() if before.get(path) != time]
            push_folder(save_directory, model, repo_id, files=written, token=kwargs.get("token"), **of_hub)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs) -> CommitInfo:
        """
        As in `PreTrainedModel`, with a model card of what is known; one that a person wrote stays as it is.

        Args:
            repo_id: Repository, as owner/name or the name alone; created if it does not exist.
            max_shard_size: Size of a file of weights, above which they are split.
            **kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, self, repo_id, **kwargs)


def push_folder(
    folder: str | os.PathLike,
    model: Any,
    repo_id: str,
    *,
    files: Sequence[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] | None = None,
    released: str | None = None,
    pipeline: str | None = None,
) -> CommitInfo:
    """
    Uploads a folder of a model or a pipeline, with a model card that is written into it.

    Args:
        folder: The folder.
        model: The model that the card describes.
        repo_id: As in [`~StellarHubMixin.push_to_hub`], and so are the arguments that are not named here.
        files: Which files of the folder, by their paths in it; all by default.
        released: As in [`write_model_card`].
        pipeline: As in [`write_model_card`].
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    write_model_card(
        folder,
        model,
        repo_id=repo_id,
        revision=revision,
        token=token,
        tags=tags,
        released=released,
        pipeline=pipeline,
    )
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message or f"Upload {pipeline or 'model'}",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        allow_patterns=None if files is None else [*files, "README.md", FIGURE_NAME],
    )


# Files ---------------------------------------------------------------------------------------------------------------


def apply_umask(folder: str | os.PathLike) -> None:
    """
    Gives the files of weights in a folder the permissions that the process's umask allows, as its other files have:
    safetensors 0.8 writes them readable by their owner alone, whatever the umask says.
    """
    umask = os.umask(0o077)  # which cannot be read without setting it; meanwhile threads create private files
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        with suppress(PermissionError):  # a file system without permissions
            file.chmod(0o666 & ~umask)


@contextmanager
def written_aside(path: str | os.PathLike, prefix: str = "_saving-") -> Iterator[Path]:
    """
    Gives the name of a file to write in place of `path`. It is renamed when it is whole; where writing fails, as on a
    full disk, it is removed, and what was there stays as it was.

    Args:
        path: The file to write or to replace.
        prefix: Of the other name, in the same folder. The Trainer pushes nothing that starts with the default;
            `datasets` reads nothing that starts with a dot.
    """
    path = Path(path)
    aside = path.with_name(f"{prefix}{path.name}.unfinished")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file by [`written_aside`]."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _modification_times(folder: str | os.PathLike) -> dict[str, int]:
    """When each file in a folder was last modified, in nanoseconds, by path in the folder; none if there is none."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


# The model card ------------------------------------------------------------------------------------------------------


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
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    training: Mapping[str, object] | None = None,
    released: str | None = None,
    pipeline: str | None = None,
) -> None:
    """
    Writes README.md, a model card of what is known, with the figure of the folder if there is one. A card that a
    person wrote or edited, in the folder or in the repository, is never overwritten: the repository's is then copied
    to the folder.

    Args:
        folder: Folder of the model, which exists.
        model: The model that the card describes.
        name: Title of the card; by default the repository's, or the folder's, name.
        repo_id: Repository that the folder is for, as owner/name; `None` if there is none.
        revision: Branch of the repository; the main one by default.
        token: Token for the repository; by default the one that is logged in.
        license: Licence of the weights, as the Hub abbreviates it; of released ones it is the authors'.
        language: As in the metadata of the Hub's model cards.
        tags: Tags beside those of every STELLAR model.
        base_model: Model that the training started from; by default the one that `model` was loaded from on the Hub.
        dataset: What the data of training and evaluation is called. Without it and `dataset_ids`, metrics are told
            in the text alone, since the Hub asks for their data set.
        dataset_ids: Data sets on the Hub, as owner/name.
        data: What else to say of the data, where it has no name.
        metrics: Results by name. The metadata has those that the Hub has a metric for: accuracy and mean IoU.
        baselines: What else was measured, such as `"kmeans"`, and its results by the names of `metrics`. They stand
            beside the model's.
        training: Settings of the training by name.
        released: Name of the released model that this one is, such as `"stellar-b16"`: the card then has the authors'
            licence and published results, named as such.
        pipeline: Class of the pipeline that the folder holds, where the model lies in it as the component `model`.

    Raises:
        OSError: If it cannot be written; the card that was there is then as it was.
    """
    path = Path(folder, "README.md")
    if path.exists() and _is_by_a_person(path):
        return
    on_hub = None if repo_id is None else _card_on_hub(repo_id, revision, token)
    if on_hub is not None and _is_by_a_person(on_hub):
        shutil.copyfile(on_hub, path)
        return

    name = name or (repo_id or Path(folder).absolute().name).split("/")[-1]
    if released is not None:
        license, base_model, dataset_ids = RELEASED_LICENSE, RELEASED_REPOSITORY, [_IMAGENET]
    base_model = base_model or _loaded_from(model, repo_id)
    auto_class = _auto_class(model)
    pipeline_tag = _PIPELINE_TAGS.get(pipeline or auto_class, "image-feature-extraction")
    dataset = dataset or ", ".join(dataset_ids)
    results = metrics or {}
    metric_ids = {metric for name in results if (metric := _metric_id(name))}
    eval_results = _eval_results(pipeline_tag, dataset, dataset_ids, results) + _published_results(released)
    card_data = ModelCardData(
        library_name="transformers" if pipeline is None else "diffusers",
        license=license,
        language=language,
        pipeline_tag=pipeline_tag,
        tags=["stellar", "self-supervised", *tags],
        base_model=base_model,
        datasets=list(dataset_ids) or None,
        metrics=sorted({result.metric_type for result in eval_results} | metric_ids) or None,
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )
    # Transformers finds code in the main folder alone, and a pipeline needs this package anyway.
    has_code = pipeline is None and getattr(model.config, "auto_map", None) is not None
    has_processor = pipeline is None or Path(folder, "image_processor").exists()
    address = repo_id or name
    card = ModelCard.from_template(
        card_data,
        template_str=_CARD,
        name=name,
        released=released,
        base_model=base_model,
        license=license,
        figure=FIGURE_NAME if Path(folder, FIGURE_NAME).exists() else None,
        auto_class=auto_class,
        has_code=has_code,
        has_processor=has_processor,
        address=address,
        arguments=_arguments(address, has_code, pipeline and "model"),
        processor_arguments=_arguments(address, has_code, pipeline and "image_processor"),
        pipeline=pipeline,
        decoding=_decoding(folder, model, address) if has_processor else None,
        draws=pipeline == "StellarTokenPriorPipeline",
        class_name=type(model).__name__,
        config=model.config,
        num_parameters=f"{model.num_parameters():,}",
        num_patches=(model.config.image_size // model.config.patch_size) ** 2,
        data=dataset or data,
        training=training,
        results=results,
        baselines=baselines or {},
        published=PUBLISHED_RESULTS,
        is_published=released in {row[0] for row in PUBLISHED_RESULTS},
    )
    replace_text(path, _sealed(str(card)))


def edit_model_card(path: str | os.PathLike, edit: Callable[[ModelCard], None]) -> None:
    """
    Changes a model card, and leaves it what it was: one that a person wrote stays theirs, and one of ours is still
    brought up to date.

    Args:
        path: The card; where there is none, one is begun.
        edit: Changes its `data` and `text`.

    Raises:
        OSError: If it cannot be written; the card that was there is then as it was.
    """
    path = Path(path)
    content = path.read_text(encoding="utf-8") if path.exists() else f"# {path.absolute().parent.name}\n"
    is_ours = path.exists() and not _is_by_a_person(path) and _SEAL in content
    card = ModelCard(content.rpartition(_SEAL)[0] if is_ours else content)
    edit(card)
    replace_text(path, _sealed(str(card)) if is_ours else str(card))


def _sealed(content: str) -> str:
    return f"{content}{_SEAL}{hashlib.sha256(content.encode()).hexdigest()[:16]} -->\n"


def _is_by_a_person(path: Path) -> bool:
    """Whether a card is neither empty, nor Transformers' empty form, nor one of ours as it was written."""
    content = path.read_text(encoding="utf-8", errors="replace").strip()
    written, _, _ = content.rpartition(_SEAL)
    if not content or content == _sealed(written).strip():
        return False
    forms = (ModelCard.from_template(ModelCardData(), model_description=form).text.strip() for form in _FORMS)
    return not any(
        content.endswith(form) and _METADATA_OF_FORM.fullmatch(content.removesuffix(form)) for form in forms
    )


def _card_on_hub(repo_id: str, revision: str | None, token: str | bool | None) -> Path | None:
    try:
        return Path(hf_hub_download(repo_id, "README.md", revision=revision, token=token))
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


def _auto_class(model: PreTrainedModel) -> str:
    """The Auto class that a user of the model needs: for its head, or for the features alone."""
    names = {reference.split(".")[-1]: auto_class for auto_class, reference in AUTO_MAP.items()}
    auto_class = names.get(type(model).__name__, "AutoModel")
    return "AutoModel" if auto_class == "AutoModelForPreTraining" else auto_class


def _arguments(address: str, has_code: bool, subfolder: str | None) -> str:
    """What the card passes to `from_pretrained`."""
    arguments = f'"{address}"' + (", trust_remote_code=True" if has_code else "")
    return arguments if subfolder is None else f'{arguments}, subfolder="{subfolder}"'


def _loaded_from(model: PreTrainedModel, repo_id: str | None) -> str | None:
    """The other repository that the model was loaded from, if any; never a local path."""
    source = model.name_or_path or ""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return source if on_hub and source != repo_id else None


def _decoding(folder: str | os.PathLike, model: PreTrainedModel, name: str) -> str | None:
    """Lines that make a pipeline; `None` of a model that cannot decode alone."""
    if Path(folder, "model_index.json").exists():
        return _LOADED_PIPELINE.format(name=name)
    decodes = type(model).__name__ in ("StellarForPreTraining", "StellarForImageReconstruction")
    if decodes and model.config.reconstruction_target == "pixels":
        return _BUILT_PIPELINE.format(name=name)
    return None


def _eval_results(
    task: str, dataset: str, dataset_ids: Sequence[str], metrics: Mapping[str, float]
) -> list[EvalResult]:
    """What the metadata tells of results: those of a named data set that the Hub has a metric for."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_ids[0] if dataset_ids else dataset.replace(" ", "-"),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if dataset and (metric := _metric_id(name))
    ]


def _published_results(released: str | None) -> list[EvalResult]:
    """The published accuracies of a released model, with their source."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_IMAGENET,
            dataset_name="ImageNet-1k",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"{name} accuracy, as published",
            metric_value=round(percent / 100, 4),
            source_name="STELLAR, Table 1",
            source_url="https://arxiv.org/abs/2602.01905",
        )
        for model, _, linear, knn, *_ in PUBLISHED_RESULTS
        if model == released
        for name, percent in (("linear probe", linear), ("kNN", knn))
    ]


def _metric_id(name: str) -> str | None:
    """The Hub's metric of a result: `test_knn_accuracy` is an accuracy."""
    return next((metric for end, metric in _METRIC_IDS.items() if f"_{name}".endswith(f"_{end}")), None)
