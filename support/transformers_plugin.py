"""Packed folders in transformers 5: after `import support.transformers_plugin`, `from_pretrained` opens them.

    import support.transformers_plugin
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("PACKED")  # the linear layers are kernel.BCQLinear

It generates and is saved with `save_pretrained` like any other model. If embedding and lm_head are bit-planes too, they
are a `BCQEmbedding` and a `BCQLinear`.
"""

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kernel import BCQEmbedding, BCQLinear


@register_quantization_config("flexbcq")
class FlexBCQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder, kept as it is."""

    def __init__(self, quant_method: str = "flexbcq", bits: int = 3, group_size: int = -1, head_bits=None, **settings):
        self.quant_method, self.bits, self.group_size, self.head_bits = quant_method, bits, group_size, head_bits
        for name, value in settings.items():
            setattr(self, name, value)


@register_quantizer("flexbcq")
class FlexBCQQuantizer(HfQuantizer):
    """Puts an empty `BCQLinear` in the place of every linear layer of the blocks, before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and ".layers." in f".{name}":
                has_bias = linear.bias is not None
                with torch.device(linear.weight.device):
                    packed = BCQLinear(
                        linear.in_features, linear.out_features, config.bits, config.group_size, has_bias
                    )
                model.set_submodule(name, packed.requires_grad_(False))
        if config.head_bits:
            self.pack_head(model)
        return model

    def pack_head(self, model: nn.Module) -> None:
        """An empty `BCQEmbedding` and `BCQLinear` in the place of embedding and lm_head."""
        table = model.get_input_embeddings().weight  # (vocab_size, hidden_size)
        shape = table.shape[1], table.shape[0], self.quantization_config.head_bits
        with torch.device(table.device):
            embedding, head = BCQEmbedding(*shape), BCQLinear(*shape)
        embedding.dtype = table.dtype
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)

        # tied: the head gets the buffers of the embedding later; until then it has some that are in no file
        if model.config.tie_word_embeddings:
            head._non_persistent_buffers_set.update(head._buffers)
            model.all_tied_weights_keys = {}  # names of parameters, which there are none of

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if self.quantization_config.head_bits and model.config.tie_word_embeddings:
            model.get_output_embeddings()._buffers = model.get_input_embeddings()._buffers
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
