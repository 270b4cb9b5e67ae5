"""The array type that the imaging steps exchange."""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""(H, W) for a mask or an alpha channel, (H, W, 3) for sRGB, (H, W, 4) for RGBA; 0 to 255."""
