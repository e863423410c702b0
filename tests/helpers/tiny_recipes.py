"""A recipe that any machine trains in a moment, for the tests of runs and launches."""

import yaml

RECIPE = {
    "model_config": {
        "model_type": "llama", "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "use_liger": True, "use_cpu": True, "bf16": False, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip


def write_recipe(folder, vocab_size: int = 131, **content) -> str:
    """Path of ``RECIPE`` in ``folder``, with ``content`` beside or instead of its keys; it trains into ``out``."""
    model_config = {**RECIPE["model_config"], "vocab_size": vocab_size}
    recipe = {**RECIPE, "model_config": model_config, "output_dir": str(folder / "out"), **content}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)
