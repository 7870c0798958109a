"""Packed folders in transformers 5: after `import support.transformers_plugin`, `from_pretrained` opens them.

    import support.transformers_plugin
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("PACKED")  # the linear layers are kernel.BCQLinear

It generates and is saved with `save_pretrained` like any other model.
"""

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kernel import BCQLinear


@register_quantization_config("flexbcq")
class FlexBCQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder, kept as it is."""

    def __init__(self, quant_method: str = "flexbcq", bits: int = 3, group_size: int = -1, **settings):
        self.quant_method, self.bits, self.group_size = quant_method, bits, group_size
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
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
