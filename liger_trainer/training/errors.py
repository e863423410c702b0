"""The error of a run that was asked for wrongly."""


class RecipeError(ValueError):
    """A recipe, an override or a launch that cannot run; the message names the key, its value and what is allowed.

    It ends a run with that message alone (``failures``). Every other ``ValueError`` keeps its traceback.
    """
