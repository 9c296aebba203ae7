# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
What test_distributed.py lets one and two processes do.

    torchrun --nproc_per_node=2 tests/training/distributed_tasks.py FOLDER TASK ...

FOLDER holds the configuration of a tiny model; each process saves the result of each task as FOLDER/TASK-RANK.pt.
"""

import copy
import os
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed

from stellar_hf import StellarConfig, StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from stellar_hf.data import EndlessStream

NUM_VIEWS = 2
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "deepspeed_zero2.json"
VARIANTS = {
    "plain": {},
    "teacher": {"use_teacher": True},
    "standardized": {"standardize_projections": True},
    "standardized_teacher": {"standardize_projections": True, "use_teacher": True},
}


# Models and data -----------------------------------------------------------------------------------------------------


def make_model(folder, **config):
    set_seed(0)
    model = StellarForPreTraining(StellarConfig.from_pretrained(folder, **config))
    if model.teacher is not None:
        with torch.no_grad():  # a teacher that has gone its own way
            for weight in model.teacher.parameters():
                weight.add_(0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0)
    return model.train()


def make_views(num_images=8):
    """Rows with all that is drawn at random otherwise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        {
            "pixel_values": normal(3, 32, 32),
            "global_pixel_values": normal(NUM_VIEWS, 3, 32, 32),
            "local_pixel_values": normal(1, 3, 16, 16),
            "noise": torch.rand(NUM_VIEWS, 16, generator=generator),
        }
        for _ in range(num_images)
    ]


def collate_views(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "noise": batch["noise"].flatten(0, 1)}


def make_images(sizes_of_shards):
    rng = np.random.default_rng(0)
    for size in sizes_of_shards:
        for _ in range(size):
            yield {"image": rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)}


def make_trainer(
    folder, model, callbacks=None, data_collator=None, train_dataset=None, eval_dataset=None, **arguments
):
    defaults = {
        "output_dir": str(Path(folder, "run")),
        "num_global_views": NUM_VIEWS,
        "num_local_views": 1,
        "local_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": "deepspeed" not in arguments,
    }
    args = StellarTrainingArguments(**{**defaults, **arguments})
    if args.fsdp:
        # Accelerate shards for accelerators alone, though torch does it on a CPU, too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return StellarTrainer(model, args, data_collator, train_dataset, eval_dataset, callbacks)


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients = gradients_of(model)
        self.learning_rate = optimizer.param_groups[0]["lr"]


def gradients_of(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# Tasks ---------------------------------------------------------------------------------------------------------------


def step(folder, num_accumulated=1, **config):
    """One optimizer step on all images, in one or several global batches, and an evaluation."""
    keep = KeepGradients()
    model = make_model(folder, **config)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(
        folder,
        model,
        callbacks=[keep],
        train_dataset=make_views(),
        eval_dataset=make_views(),
        data_collator=collate_views,
        max_steps=1,
        per_device_train_batch_size=8 // num_accumulated // world_size,
        per_device_eval_batch_size=4 // world_size,
        gradient_accumulation_steps=num_accumulated,
    )
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {
        "gradients": keep.gradients,
        "learning_rate": keep.learning_rate,
        "log": next(log for log in trainer.state.log_history if "loss" in log),
        "eval_loss": eval_loss,
        "weights": model.state_dict(),
    }


class Indices(torch.utils.data.Dataset):
    """The same image everywhere, and a record of who was asked for."""

    def __init__(self, num_images):
        (self.row,) = make_images([1])
        self.num_images = num_images
        self.seen = []

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        self.seen.append(index)
        return self.row


def draws(folder):
    """6 steps of a model with a teacher, on 2 epochs of 12 images."""
    images = Indices(12)
    model = make_model(folder, use_teacher=True)
    start = copy.deepcopy(model.teacher.state_dict())
    forwards = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: forwards.append((inputs["pixel_values"].clone(), torch.get_rng_state())),
        with_kwargs=True,
    )
    trainer = make_trainer(
        folder, model, train_dataset=images, num_train_epochs=2, per_device_train_batch_size=2, teacher_momentum=0.9
    )
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "seen": images.seen,
        "views": torch.stack([views for views, _ in forwards]),
        "states": [state for _, state in forwards],
        "weights": model.state_dict(),
        "first_teacher": start,
    }


def second_order(folder):
    """Images that a second training in the same process asks for."""
    images = Indices(16)
    trainer = make_trainer(
        folder, make_model(folder), train_dataset=images, max_steps=4, per_device_train_batch_size=2
    )
    trainer.train()
    images.seen.clear()
    trainer.train()
    return images.seen


def ended_in_the_last_evaluation(folder):
    """What one process makes of a signal that another one gets in the last evaluation."""

    class Terminate(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if args.process_index == 1:
                signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(
        folder,
        make_model(folder),
        callbacks=[Terminate()],
        train_dataset=make_views(),
        eval_dataset=make_views(),
        data_collator=collate_views,
        max_steps=1,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        output_dir=str(Path(folder, "ended")),
    )
    trainer.train()
    return {"exit_status": trainer.exit_status, "checkpoint": trainer.last_checkpoint().folder.name}


def draws_of_workers(folder):
    """Views that a worker process made of the same image."""
    views = []
    model = make_model(folder)
    model.register_forward_pre_hook(
        lambda module, args, inputs: views.append(inputs["pixel_values"].clone()), with_kwargs=True
    )
    make_trainer(
        folder,
        model,
        train_dataset=Indices(8),
        max_steps=2,
        per_device_train_batch_size=2,
        views_on="cpu",
        dataloader_num_workers=1,
    ).train()
    return torch.cat(views)


def prior(folder):
    """Three steps of a prior over tokens: the images and random states of its forwards, and what it ends with."""
    from transformers import TrainingArguments

    from stellar_hf import StellarTokenPrior
    from stellar_hf.prior import StellarTokenPriorTrainer

    set_seed(0)
    sizes = {"num_sparse_tokens": 2, "token_size": 4, "grid_size": (4, 4), "num_classes": 2, "hidden_size": 16}
    model = StellarTokenPrior(**sizes, num_layers=1, num_attention_heads=2, localization_channels=8)
    rows = [
        {
            "sparse_tokens": torch.full((2, 4), float(index)),
            "localization": torch.full((16, 2), 0.5),
            "class_labels": torch.tensor(index % 2),
        }
        for index in range(12)
    ]
    args = TrainingArguments(
        str(Path(folder, "prior")), max_steps=3, per_device_train_batch_size=2, use_cpu=True, save_strategy="no"
    )
    trainer = StellarTokenPriorTrainer(model, args, train_dataset=rows)
    forwards = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: forwards.append((inputs["sparse_tokens"][:, 0, 0], torch.get_rng_state())),
        with_kwargs=True,
    )
    trainer.train()
    return {
        "images": torch.cat([images for images, _ in forwards]),
        "states": [state for _, state in forwards],
        "weights": trainer.model.state_dict(),
    }


def ends(folder):
    """Data that leaves some process with fewer images than others; the number of steps and of forwards of each."""

    def stream(*sizes):
        return datasets.IterableDataset.from_generator(make_images, gen_kwargs={"sizes_of_shards": list(sizes)})

    def rows(number):
        return list(make_images([number]))

    cases = {
        "rows": {"train_dataset": rows(7), "num_train_epochs": 2},
        "rows, accumulated": {"train_dataset": rows(7), "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        "few rows": {"train_dataset": rows(1), "num_train_epochs": 2},
        "one shard": {"train_dataset": stream(9), "max_steps": 3},
        "unequal shards": {"train_dataset": stream(1, 2, 6), "max_steps": 3},
        "unequal shards, accumulated": {
            "train_dataset": stream(3, 4, 9),
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
        },
    }
    result = {}
    for name, case in cases.items():
        model = make_model(folder)
        forwards = []
        model.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        trainer = make_trainer(folder, model, per_device_train_batch_size=2, **case)
        trainer.train()
        result[name] = {"steps": trainer.state.global_step, "forwards": len(forwards)}
    for name, dataset in (("rows", rows(7)), ("unequal shards", stream(3, 4, 5, 12))):
        trainer = make_trainer(folder, make_model(folder), eval_dataset=dataset, per_device_eval_batch_size=2)
        result[f"evaluated {name}"] = trainer.evaluate()["eval_loss"]
    uneven = {"dispatch_batches": False, "even_batches": False}
    result["uneven batches"] = refusal(lambda: make_trainer(folder, model, accelerator_config=uneven))
    return result


def streamed(folder):
    """What a process reads of a stream of 4 shards of 3 images, and trains on in 4 steps, also where it goes on."""
    read, seen = [], []

    def images(shards):
        for shard in shards:
            for number in range(3 * shard, 3 * shard + 3):
                read.append(number)
                yield {"image": number}

    def collate(rows):
        seen.extend(row["image"] for row in rows)
        return collate_views(make_views(len(rows)))

    def train(**arguments):
        stream = datasets.IterableDataset.from_generator(images, gen_kwargs={"shards": [0, 1, 2, 3]})
        trainer = make_trainer(
            folder,
            make_model(folder),
            train_dataset=EndlessStream(stream, seed=0, buffer_size=2),
            data_collator=collate,
            max_steps=4,
            per_device_train_batch_size=2,
            output_dir=str(Path(folder, "streamed")),
            **arguments,
        )
        trainer.train(resume_from_checkpoint=None if arguments else str(Path(folder, "streamed", "checkpoint-2")))
        return {"read": list(read), "seen": seen[:8], "weights": trainer.model.state_dict()}

    whole = train(save_strategy="steps", save_steps=2)
    read.clear()
    seen.clear()
    return whole, train()


def measured(folder):
    """What an evaluation measures of whole images, seven of two classes."""
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8), "label": i % 2} for i in range(7)]
    metrics = make_trainer(folder, make_model(folder), train_dataset=rows[::-1], eval_dataset=rows).evaluate()
    return {name: metrics[name] for name in ("eval_psnr", "eval_knn_accuracy")}


def sharded(folder):
    """A step of a model that torch's FSDP2 shards as Accelerate does, beside the same step of the whole model."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    PartialState(cpu=True)
    batch = collate_views(make_views()[dist.get_rank() :: dist.get_world_size()])
    plain, model = (make_model(folder, use_teacher=True) for _ in range(2))
    wrapped = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in (*wrapped, model.get_input_embeddings(), model.stellar.layernorm, model):
        if not isinstance(module, FSDPModule):
            fully_shard(module)

    result = {}
    for name, module in (("plain", plain), ("sharded", model)):
        optimizer = torch.optim.SGD([weight for weight in module.parameters() if weight.requires_grad], lr=0.1)
        loss = module(**batch).loss
        loss.backward()
        gradients = {key: whole(value) for key, value in gradients_of(module).items()}
        if name == "plain":
            for value in gradients.values():
                dist.all_reduce(value, op=dist.ReduceOp.SUM)
                value /= dist.get_world_size()
            for key, weight in module.named_parameters():
                weight.grad = gradients.get(key)
        optimizer.step()
        module.update_teacher(0.9)
        weights = {key: whole(value) for key, value in module.state_dict().items()}
        result[name] = {"loss": loss.item(), "gradients": gradients, "weights": weights}
    return result


def three_steps(folder, **arguments):
    """Three steps, checkpoints, the model saved, and an evaluation."""
    model = make_model(folder, use_teacher=True)
    start = {name: weight.clone() for name, weight in model.teacher.state_dict().items()}
    trainer = make_trainer(
        folder,
        model,
        train_dataset=make_views(),
        eval_dataset=make_views(),
        data_collator=collate_views,
        max_steps=3,
        per_device_train_batch_size=4 // dist.get_world_size(),
        teacher_momentum=0.9,
        save_strategy="steps",
        save_steps=3,
        **arguments,
    )
    trainer.train()
    trainer.save_model(str(Path(trainer.args.output_dir, "model")))
    return {
        "names": [name for name, _ in model.named_parameters()],
        "sharded": [name for name, weight in trainer.model.named_parameters() if isinstance(weight, DTensor)],
        "teacher_start": start,
        "weights": {name: whole(weight) for name, weight in trainer.model.state_dict().items()},
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def deepspeed_steps(folder, config):
    # Accelerate starts DeepSpeed on a CPU only if it is told the backend, which training arguments do not.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")
    return three_steps(
        folder,
        deepspeed=config,
        output_dir=str(Path(folder, "deepspeed")),
        accelerator_config={"dispatch_batches": False, "use_configured_state": True},
    )


def refusal(task):
    with pytest.raises(ValueError) as error:
        task()
    return str(error.value)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


TASKS = {
    **{name: lambda folder, config=config: step(folder, **config) for name, config in VARIANTS.items()},
    "accumulated": lambda folder: step(folder, num_accumulated=2, use_teacher=True),
    "draws": draws,
    "draws_of_workers": draws_of_workers,
    "second_order": second_order,
    "ended_in_the_last_evaluation": ended_in_the_last_evaluation,
    "ends": ends,
    "streamed": streamed,
    "measured": measured,
    "prior": prior,
    "sharded": sharded,
    "sharded_trainer": lambda folder: three_steps(folder, fsdp=True, output_dir=str(Path(folder, "fsdp"))),
    "replicated_trainer": three_steps,
    "zero1": lambda folder: deepspeed_steps(folder, {**DEEPSPEED, "zero_optimization": {"stage": 1}}),
    "zero2": lambda folder: deepspeed_steps(folder, str(EXAMPLE)),
    "zero3": lambda folder: refusal(lambda: deepspeed_steps(folder, {**DEEPSPEED, "zero_optimization": {"stage": 3}})),
}

if __name__ == "__main__":
    folder, *tasks = sys.argv[1:]
    for task in tasks:
        result = TASKS[task](folder)
        torch.save(result, Path(folder, f"{task}-{os.environ['RANK']}.pt"))
    dist.destroy_process_group()
