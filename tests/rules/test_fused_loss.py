"""The fused_loss rule: which models and heads it skips."""

from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model

from liger_trainer import apply_liger


def test_models_that_change_their_logits_are_left_to_the_ordinary_path():
    model, inputs = tiny_model("llama"), batch()

    class Squared(type(model)):
        def forward(self, *args, **kwargs):
            loss_function = self.loss_function
            self.loss_function = lambda logits, *a, **k: loss_function(logits**2, *a, **k)
            out = super().forward(*args, **kwargs)
            del self._loss_function
            return out

    model.__class__ = Squared
    theirs = loss_and_gradients(model, inputs)
    report = apply_liger(model)
    assert [s.kind for s in report.skipped] == ["fused_loss", "unpad", "padding_mask"]
    assert_same_training(theirs, loss_and_gradients(model, inputs))
