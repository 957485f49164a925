"""Transformers' own Qwen2VLProcessor without torchvision: the oracle for ids, masks, types, grids and pixels of images."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from hooked_qwen2vl import Processor


class ImagesOnly(Qwen2VLProcessor):
    """Built with no video processor: its class cannot be looked up where torchvision is missing."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def reference_processor(processor: Processor) -> ImagesOnly:
    return ImagesOnly(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=None,
        chat_template=processor.chat_template,
    )
