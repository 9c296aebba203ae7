# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Moves an object across a tabletop scene, step by step: its token S should stay the same, and its map L should move.

    python examples/moving_object.py                                 # the demo model
    python examples/moving_object.py my-stellar other-stellar --seed 3 --output moving_object.png

Draws the pictures, the map of the object's token in each for every model and for an untrained one, and two curves: the
cosine of the token and the first picture's, and the centroid of the map beside the object's true place.
"""

import argparse

import stellar_hf
from stellar_hf.data import load_moving_object
from stellar_hf.evaluation import SceneObjects, follow_object, load_subject, object_features, untrained
from stellar_hf.features import encode_images
from stellar_hf.visualization import plot_moving_object


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=[stellar_hf.DEMO_MODEL], help="Folders, or owner/name on the Hub."
    )
    parser.add_argument("--split", default="test", help="Split of the photographs that cover the objects.")
    parser.add_argument("--num_frames", type=int, default=8, help="Steps across the scene.")
    parser.add_argument("--seed", type=int, default=0, help="Of the scene, and of the untrained weights.")
    parser.add_argument("--output", default="moving_object.png", help="File of the figure.")
    args = parser.parse_args()

    subjects = [load_subject(model) for model in args.models]
    subjects.append(untrained(subjects[0], args.seed))
    scenes = load_moving_object(args.split, args.num_frames, subjects[0].model.config.image_size, args.seed)
    objects = SceneObjects.from_dataset(scenes)
    tracks = {}
    for subject in subjects:
        features = encode_images(subject.model, scenes, subject.processor, encode=object_features, show_progress=False)
        track = tracks[subject.name] = follow_object(features.tensors, objects.mask)
        distance = (track["centroid"] - objects.position[:, 0]).norm(dim=1).mean()
        cosines = (f"{track[name][1:].mean():.2f}" for name in ("token_cosine", "other_cosine"))
        print("{}: cosine {} (of other tokens {}), map {:.2f} off".format(subject.name, *cosines, distance))
    plot_moving_object(scenes["image"][:], objects.position[:, 0], tracks).savefig(args.output)


if __name__ == "__main__":
    main()
