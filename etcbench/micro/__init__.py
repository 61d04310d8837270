"""The embedded micro world: pictures, questions, benchmarks and models small enough to commit.

Importing this package imports nothing heavy. What training code uses:

``etcbench.micro.stream.TurnStream(seed, cells, policy, turns, mix, blind_share).sample(i)``
    Training sample ``i``, the same on every call: ``{"picture": uint8 [H, W, 3] or None (blind),
    "turns": [(question, answer), ...], "kinds": [str, ...], "scene": Scene}``. The question is what
    stands between the picture's line and ``" ASSISTANT:"`` of LLaVA's prompt, suffix included; the
    answer is bare and is encoded with one space in front, then ``</s>``. ``mix`` maps the kinds of
    ``etcbench.micro.stream.MIX`` to weights; a kind that a stage leaves out is forgotten.
    ``policy`` is ``"train"``, or ``"iid"``, ``"combo"`` or ``"objects"`` for measuring.

``etcbench.micro.model.build_processor()``, ``build_micro_llava(seed, vision_weights)``,
``save_micro_llava(model, folder)``
    An untrained model (vision tower from the warm-up if given) and its processor; saving stores
    half precision that loads as float32. ``normalise(picture)`` is the processor's picture step
    without its overhead.

``etcbench.micro.warmup.train(output_dir, steps, seed)``
    Stage A; gives ``vision.safetensors``.

``etcbench.micro.untrained.build(name, seed, warmup_steps, warmup_output)``, ``save(...)``
    Either embedded model (``micro-llava``, ``micro-qwen3vl``) before its training, by name.

Written once, and committed: ``python -m etcbench.micro.artwork`` (the sprites),
``python -m etcbench.micro.rows`` (the benchmarks in ``data/``).
"""
