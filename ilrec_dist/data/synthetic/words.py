"""Words for the generated shop.

Titles and texts that carry an item's category and kind.
"""

from __future__ import annotations

import numpy as np

# Category → words of the whole category, then its kinds.
CATEGORIES: dict[str, list[str]] = {
    "coffee": [
        "barista roast crema",
        "espresso beans",
        "burr grinder",
        "gooseneck kettle",
        "paper filters",
        "stoneware mug",
    ],
    "guitar": [
        "fretboard chord luthier",
        "acoustic strings",
        "clip tuner",
        "leather strap",
        "tube amplifier",
        "flight case",
    ],
    "garden": [
        "soil greenhouse perennial",
        "pruning shears",
        "seed tray",
        "watering can",
        "compost bin",
        "trellis netting",
    ],
    "cycling": [
        "peloton gravel drivetrain",
        "inner tube",
        "chain lube",
        "handlebar tape",
        "floor pump",
        "rear light",
    ],
    "camping": [
        "backcountry trailhead bivouac",
        "dome tent",
        "down quilt",
        "gas stove",
        "dry bag",
        "head lamp",
    ],
    "baking": [
        "sourdough crumb pastry",
        "bread tin",
        "rolling pin",
        "proofing basket",
        "dough scraper",
        "piping nozzle",
    ],
    "sewing": [
        "hem seam tailoring",
        "cotton thread",
        "fabric scissors",
        "zip fastener",
        "pattern paper",
        "pin cushion",
    ],
    "aquarium": [
        "reef freshwater tank",
        "sponge filter",
        "gravel vacuum",
        "driftwood root",
        "fish flakes",
        "heater rod",
    ],
    "painting": [
        "pigment gesso portrait",
        "oil colours",
        "hog brush",
        "linen canvas",
        "palette knife",
        "field easel",
    ],
    "running": [
        "marathon pace sprint",
        "trail shoes",
        "compression socks",
        "hydration vest",
        "energy gel",
        "reflective band",
    ],
    "photography": [
        "shutter exposure darkroom",
        "prime lens",
        "ball tripod",
        "memory card",
        "lens cloth",
        "camera sling",
    ],
    "pottery": [
        "wheel ceramic kiln",
        "stoneware clay",
        "trimming tool",
        "celadon glaze",
        "throwing bat",
        "kiln shelf",
    ],
    "climbing": [
        "boulder summit crag",
        "dynamic rope",
        "wire carabiner",
        "chalk bag",
        "belay gloves",
        "crag harness",
    ],
    "chess": [
        "opening gambit checkmate",
        "weighted pieces",
        "walnut board",
        "digital clock",
        "score book",
        "endgame manual",
    ],
    "astronomy": [
        "nebula telescope orbit",
        "plossl eyepiece",
        "star atlas",
        "equatorial mount",
        "moon filter",
        "dew heater",
    ],
    "woodwork": [
        "dovetail joinery grain",
        "block plane",
        "bench chisel",
        "marking gauge",
        "bar clamp",
        "japanese saw",
    ],
    "knitting": [
        "stitch skein purl",
        "merino yarn",
        "circular needles",
        "stitch markers",
        "row counter",
        "lace chart",
    ],
    "fishing": [
        "angler trout river",
        "spinning reel",
        "braided line",
        "landing net",
        "tackle box",
        "wading boots",
    ],
    "tea": [
        "leaf infusion steep",
        "green sencha",
        "glass teapot",
        "bamboo whisk",
        "tin caddy",
        "porcelain gaiwan",
    ],
    "printing": [
        "letterpress typeface etching",
        "lino block",
        "ink roller",
        "cotton rag",
        "brass type",
        "bone folder",
    ],
}
MAKERS = [
    "Alder",
    "Birk",
    "Corva",
    "Dunlin",
    "Esker",
    "Fjell",
    "Gannet",
    "Holm",
    "Ister",
    "Jarrah",
    "Kestrel",
    "Lomond",
    "Marram",
    "Norden",
    "Orla",
    "Petrel",
]
FINISHES = [
    "classic",
    "compact",
    "deluxe",
    "natural",
    "slate",
    "copper",
    "ivory",
    "midnight",
    "studio",
    "travel",
    "heritage",
    "pocket",
    "premium",
    "everyday",
]


def item_words(kind: np.ndarray, kinds_per_category: int, seed: int) -> tuple[list[str], list[str]]:
    """(titles, texts) of items with these kinds, int [n].

    Beyond the twenty named categories and five kinds, names carry a number.
    """
    random = np.random.default_rng([seed, 2])
    makers, finishes = (
        random.integers(len(MAKERS), size=len(kind)),
        random.integers(len(FINISHES), size=len(kind)),
    )
    models = random.permutation(len(kind))
    titles, texts = [], []
    for item, k in enumerate(kind):
        category, name, context = _names(int(k) // kinds_per_category, int(k) % kinds_per_category)
        maker, finish = MAKERS[makers[item]], FINISHES[finishes[item]]
        titles.append(f"{maker} {finish} {name} M{models[item]:03d}")
        texts.append(f"{category} supplies: {context}; {name}")
    return titles, texts


def _names(category: int, kind: int) -> tuple[str, str, str]:
    """(category, kind, words that all of the category share)."""
    words = list(CATEGORIES)
    word = words[category % len(words)]
    context, *names = CATEGORIES[word]
    name = names[kind % len(names)] + (
        "" if kind < len(names) else f" type{kind // len(names) + 1}"
    )
    if category < len(words):
        return word, name, context
    suffix = str(category // len(words) + 1)
    return (
        word + suffix,
        f"{name} {word}{suffix}",
        " ".join(part + suffix for part in context.split()),
    )
