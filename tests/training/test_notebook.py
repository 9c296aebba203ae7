# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a training shows in a notebook."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

TRAIN = """
import numpy as np
from stellar_hf import StellarConfig, StellarForPreTraining, StellarTrainer, StellarTrainingArguments

config = StellarConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
    num_sparse_tokens=2, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=16, reconstruction_target="pixels", num_prototypes=8, prototype_dim=4,
    projection_hidden_size=8, standardize_projections=True,
)
images = [{"image": image} for image in np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)]
args = StellarTrainingArguments(
    "out", max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2, save_strategy="no", use_cpu=True,
    per_device_train_batch_size=4, num_global_views=1, num_local_views=1, report_to="none", eval_on_start=True,
)
result = StellarTrainer(StellarForPreTraining(config), args, train_dataset=images, eval_dataset=images).train()
"""


@pytest.mark.slow
def test_table_of_a_training_has_the_terms_of_the_objective_and_the_evaluations(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAIN)])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    tables = [
        output["data"]["text/html"] for output in notebook.cells[0].outputs if "text/html" in output.get("data", {})
    ]
    assert len(tables) == 1  # which is updated
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in tables[0].split("<tr")[1:]]
    titles = rows[0]
    assert {"loss", "reconstruction", "koleo", "clustering", "masked", "localization sharpness"} <= set(titles)
    assert [row[titles.index("step")] for row in rows[1:]] == ["0", "1", "2", "3", "4"]
    for step in (1, 4):
        row = dict(zip(titles, rows[1 + step], strict=False))
        terms = ("reconstruction", "koleo", "clustering", "cls clustering", "masked", "cls view")
        assert sum(float(row[term]) for term in terms) == pytest.approx(float(row["loss"]), abs=5e-3)
    assert float(rows[-1][titles.index("eval psnr")]) > 0
