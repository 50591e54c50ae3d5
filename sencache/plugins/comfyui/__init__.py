"""ComfyUI: put this folder, or a link to it, into `custom_nodes`, with sencache installed beside ComfyUI."""

from .node import SenCache

NODE_CLASS_MAPPINGS = {"SenCache": SenCache}
NODE_DISPLAY_NAME_MAPPINGS = {"SenCache": "SenCache"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
