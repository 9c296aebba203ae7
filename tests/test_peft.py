# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""LoRA on the attention projections: trains, saves, loads and merges, with PEFT and with Transformers' own methods."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from stellar_hf import (
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarModel,
    StellarTrainer,
    StellarTrainingArguments,
)

peft = pytest.importorskip("peft")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ENCODER = r"stellar\.layers\.\d+\.attention\.[qkvo]_proj"
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, **settings})


def copied(weights) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights}


def train(model, steps=20, **inputs) -> list[float]:
    """Losses of steps on one batch."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


class StartRecorder(TrainerCallback):
    """The adapters, as PEFT saves them, with which a training starts."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.adapters = copied(peft.get_peft_model_state_dict(model).items())


def views(seed=1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": PIXELS,
        "global_pixel_values": torch.randn(4, 2, 3, 32, 32, generator=generator),
        "noise": torch.rand(8, 16, generator=generator),
    }


@pytest.fixture
def build(tiny_config):
    """Builds a seeded tiny model of a class in evaluation mode."""

    def build(model_class, **fields):
        torch.manual_seed(0)
        return model_class(tiny_config(**fields)).eval()

    return build


@pytest.fixture
def classifier_folder(build, tmp_path):
    """A classifier of three classes, saved."""
    build(StellarForImageClassification, num_labels=3).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    ("model_class", "num_adapted"),
    [
        (StellarModel, 2),
        (StellarForPreTraining, 3),
        (StellarForImageClassification, 2),
        (StellarForSemanticSegmentation, 2),
        (StellarForImageReconstruction, 3),
        (StellarBackbone, 2),
    ],
)
@torch.no_grad()
def test_projections_of_encoder_and_decoder_are_adapted_and_merged(build, tmp_path, model_class, num_adapted):
    """Fresh adapters change nothing; others do, load into another model of the same weights, and merge into it."""
    model = build(model_class)
    expected = list(model(PIXELS, return_dict=True).values())
    plain = {type(module) for module in model.modules()}
    fresh = peft.get_peft_model(copy.deepcopy(model), lora())
    assert all(_equal(*pair) for pair in zip(fresh(PIXELS, return_dict=True).values(), expected, strict=True))

    adapted = peft.get_peft_model(copy.deepcopy(model), lora(init_lora_weights=False))
    assert len([name for name, _ in adapted.named_modules() if name.endswith("lora_A")]) == 4 * num_adapted
    adapted_outputs = list(adapted.eval()(PIXELS, return_dict=True).values())
    assert not _equal(adapted_outputs[0], expected[0])

    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(model_class), tmp_path)
    assert all(_equal(*pair) for pair in zip(loaded(PIXELS, return_dict=True).values(), adapted_outputs, strict=True))
    merged = loaded.merge_and_unload()
    assert type(merged) is model_class and {type(module) for module in merged.modules()} == plain
    torch.testing.assert_close(list(merged(PIXELS, return_dict=True).values()), adapted_outputs, rtol=1e-4, atol=1e-5)


def _equal(output, other) -> bool:
    if isinstance(output, tuple):
        return all(_equal(*pair) for pair in zip(output, other, strict=True))
    return torch.equal(output, other) if isinstance(output, torch.Tensor) else output == other


def test_a_classifier_learns_by_its_adapters_and_its_head_alone(classifier_folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(classifier_folder)
    model = peft.get_peft_model(model, lora(modules_to_save=["classifier"]))
    before = copied(model.named_parameters())
    losses = train(model, pixel_values=PIXELS, labels=LABELS)
    assert losses[-1] < 0.5 * losses[0]

    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert changed == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert len(changed) == 2 * 4 * 2 + 2

    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(classifier_folder)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(PIXELS).logits
        assert torch.equal(loaded(PIXELS).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(PIXELS).logits, expected, rtol=1e-4, atol=1e-5)


def test_transformers_own_methods(classifier_folder, tmp_path):
    """`add_adapter`, saving the adapter alone, `load_adapter`, and an Auto class on the folder of the adapter."""
    model = AutoModelForImageClassification.from_pretrained(classifier_folder)
    model.add_adapter(lora())
    losses = train(model, pixel_values=PIXELS, labels=LABELS)
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))

    with torch.no_grad():
        expected = model(PIXELS).logits
        loaded = AutoModelForImageClassification.from_pretrained(classifier_folder)
        assert not torch.equal(loaded(PIXELS).logits, expected)
        loaded.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(loaded(PIXELS).logits, expected)
        assert torch.equal(
            AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")(PIXELS).logits, expected
        )


def test_stock_trainer(classifier_folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(classifier_folder)
    model = peft.get_peft_model(model, lora(modules_to_save=["classifier"]))
    before = copied(model.named_parameters())
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(PIXELS, LABELS, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_loss"] > 0
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name or "modules_to_save" in name}

    loaded = AutoModelForImageClassification.from_pretrained(classifier_folder)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, model.eval()(PIXELS).logits)


# Pre-training, with a teacher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_teacher", [False, True])
def test_pretraining_learns_by_adapters_that_the_teacher_never_trains(build, use_teacher):
    model = build(StellarForPreTraining, use_teacher=use_teacher)
    adapted = peft.get_peft_model(model, lora())
    before = copied(model.named_parameters())
    losses = train(adapted, **views())
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name and not name.startswith("teacher.")}


@torch.no_grad()
def test_teacher_follows_adapters(build, tmp_path):
    model = build(StellarForPreTraining, use_teacher=True)
    adapted = peft.get_peft_model(model, lora(modules_to_save=["clustering_head"], init_lora_weights=False))
    model.update_teacher(0.0)
    teacher = model.teacher.stellar.encode(PIXELS)
    assert torch.equal(teacher, model.stellar.encode(PIXELS))
    for name, weight in model.named_parameters():
        if "lora_" in name and not name.startswith("teacher."):
            weight.add_(1)
    before = [(weight.clone(), student.clone()) for weight, student in model.teacher_and_student_weights()]
    model.update_teacher(0.9)
    for (weight, _), (old, student) in zip(model.teacher_and_student_weights(), before, strict=True):
        torch.testing.assert_close(weight, 0.9 * old + 0.1 * student)
    teacher = model.teacher.stellar.encode(PIXELS)

    adapted.save_pretrained(tmp_path)
    loaded = build(StellarForPreTraining, use_teacher=True)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path).get_base_model()
    assert torch.equal(loaded.teacher.stellar.encode(PIXELS), teacher)
    assert not torch.equal(loaded.stellar.encode(PIXELS), teacher)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENCODER},
        {"target_modules": rf"teacher\.{ENCODER}"},
        {"target_modules": PROJECTIONS, "exclude_modules": r"teacher\..*"},
    ],
    ids=["student alone", "teacher alone", "teacher excluded"],
)
def test_adapters_that_the_teacher_cannot_follow_are_refused(build, tmp_path, settings):
    model = build(StellarForPreTraining, use_teacher=True)
    adapted = peft.get_peft_model(model, lora(**settings))
    with pytest.raises(ValueError, match="adapters must be added to both"):
        model.update_teacher(0.9)
    with pytest.raises(ValueError, match="adapters must be added to both"):
        StellarTrainer(adapted, StellarTrainingArguments(str(tmp_path), use_cpu=True), train_dataset=[{"image": None}])


def test_adapters_outside_of_the_teacher_need_none_in_it(build):
    model = build(StellarForPreTraining, use_teacher=True)
    peft.get_peft_model(model, lora(target_modules=r"decoder\..*\.[qkvo]_proj"))
    model.update_teacher(0.9)
    assert not any("lora_" in name for name, _ in model.teacher.named_parameters())


def test_pretraining_with_the_trainer_resumes(build, tmp_path):
    """Adapters move, the teacher's follow, all else stays; and a checkpoint has all that moved."""
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)

    def make_trainer():
        model = peft.get_peft_model(build(StellarForPreTraining, use_teacher=True), lora())
        arguments = StellarTrainingArguments(
            str(tmp_path),
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=2,
            num_global_views=2,
            num_local_views=1,
            local_size=16,
            learning_rate=1e-2,
            warmup_steps=0,
            disable_tqdm=True,
            use_cpu=True,
        )
        return StellarTrainer(model, arguments, train_dataset=[{"image": image} for image in images])

    trainer = make_trainer()
    base_model = trainer.model.get_base_model()
    assert not any(weight.requires_grad for weight in base_model.teacher.parameters())
    before = copied(base_model.named_parameters())
    trainer.train()
    trained = copied(base_model.named_parameters())
    assert {name for name, weight in trained.items() if not torch.equal(weight, before[name])} == {
        name for name in trained if "lora_" in name
    }

    resumed = make_trainer()
    starts = StartRecorder()
    resumed.add_callback(starts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert saved.keys() == starts.adapters.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in starts.adapters.items())
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in saved} == {
        "stellar",
        "decoder",
        "teacher",
    }

    finished = make_trainer()
    finished.load_finished(finished.last_checkpoint())
    loaded = dict(finished.model.get_base_model().named_parameters())
    assert all(torch.equal(weight, loaded[name]) for name, weight in trained.items() if "lora_" in name)

    trainer.create_model_card()
    assert "StellarForPreTraining" in (tmp_path / "README.md").read_text()
