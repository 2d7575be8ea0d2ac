"""Words of the captions: objects, categories, colours, placeholders, and the tokenizer over them.

The order of `WORDS` fixes the token ids. Append only: a trained text encoder stores one row per id.
`OBJECTS` is what the model is trained on. `CANDIDATES` have ids, too, but untrained ones: a later run moves
some to the end of `OBJECTS`, and no trained id changes. `SUBJECTS` are never drawn in training.
"""

from itertools import combinations
import hashlib

# noun -> (emoji short name, category word)
OBJECTS = {
    "tiger": ("tiger2", "animal"),
    "elephant": ("elephant", "animal"),
    "turtle": ("turtle", "animal"),
    "frog": ("frog", "animal"),
    "fish": ("tropical_fish", "animal"),
    "apple": ("apple", "fruit"),
    "banana": ("banana", "fruit"),
    "strawberry": ("strawberry", "fruit"),
    "pineapple": ("pineapple", "fruit"),
    "taxi": ("taxi", "vehicle"),
    "rocket": ("rocket", "vehicle"),
    "sailboat": ("boat", "vehicle"),
    "pizza": ("pizza", "food"),
    "burger": ("hamburger", "food"),
    "donut": ("doughnut", "food"),
    "cactus": ("cactus", "plant"),
    "mushroom": ("mushroom", "plant"),
    "tree": ("evergreen_tree", "plant"),
    "house": ("house", "building"),
    "castle": ("european_castle", "building"),
    "penguin": ("penguin", "animal"),
    "pig": ("pig2", "animal"),
    "fox": ("fox_face", "animal"),
    "crab": ("crab", "animal"),
    "parrot": ("parrot", "animal"),
    "watermelon": ("watermelon", "fruit"),
    "grapes": ("grapes", "fruit"),
    "lemon": ("lemon", "fruit"),
    "bus": ("bus", "vehicle"),
    "fries": ("fries", "food"),
    "tulip": ("tulip", "plant"),
    "guitar": ("guitar", "instrument"),
    "drum": ("drum_with_drumsticks", "instrument"),
    "balloon": ("balloon", "toy"),
    "crown": ("crown", "clothing"),
    "umbrella": ("umbrella", "tool"),
    "ball": ("soccer", "toy"),
    "basketball": ("basketball", "toy"),
    "snowman": ("snowman_without_snow", "toy"),
    "bell": ("bell", "tool"),
}

CANDIDATES = {
    "cow": ("cow2", "animal"),
    "snail": ("snail", "animal"),
    "peach": ("peach", "fruit"),
    "car": ("car", "vehicle"),
    "truck": ("articulated_lorry", "vehicle"),
    "cake": ("cake", "food"),
    "hotdog": ("hotdog", "food"),
    "rose": ("rose", "plant"),
    "trumpet": ("trumpet", "instrument"),
    "violin": ("violin", "instrument"),
    "hat": ("tophat", "clothing"),
    "key": ("key", "tool"),
}

# name -> (art set, emoji short name, class noun known to the model)
SUBJECTS = {
    "ram": ("google", "ram", "animal"),
    "lion": ("google", "lion_face", "animal"),
    "octopus": ("google", "octopus", "animal"),
    "tiger-face": ("google", "tiger", "tiger"),
    "green-apple": ("google", "green_apple", "apple"),
    "cherries": ("google", "cherries", "fruit"),
    "tractor": ("google", "tractor", "vehicle"),
    "helicopter": ("google", "helicopter", "vehicle"),
    "cookie": ("google", "cookie", "food"),
    "sunflower": ("google", "sunflower", "plant"),
    "church": ("google", "church", "building"),
    "flat-elephant": ("twitter", "elephant", "elephant"),
    "flat-rocket": ("twitter", "rocket", "rocket"),
    "flat-fish": ("twitter", "tropical_fish", "fish"),
    "flat-house": ("twitter", "house", "house"),
    "flat-tiger": ("twitter", "tiger2", "tiger"),
}

# Mean colour of a background, 8-bit sRGB.
COLOURS = {
    "red": (205, 55, 50),
    "orange": (240, 150, 60),
    "yellow": (245, 220, 90),
    "green": (90, 170, 90),
    "blue": (70, 120, 210),
    "purple": (135, 85, 175),
    "pink": (240, 160, 190),
    "white": (242, 242, 242),
    "gray": (135, 135, 140),
    "brown": (130, 90, 60),
}
PATTERNS = ("plain", "striped", "dotted", "checked")

PLACEHOLDERS = tuple(f"<s{i}>" for i in range(1, 9))
PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
MAX_LENGTH = 24
ANY_OBJECT = "object"  # the neutral noun, below which all category words lie

WORDS = (
    (PAD, START, END, UNKNOWN)
    + PLACEHOLDERS
    + ("a", "an", "the", "and", "on", "with", "of", "background", "picture", "photo", ANY_OBJECT)
    + tuple(COLOURS)
    + PATTERNS
    + ("animal", "fruit", "vehicle", "food", "plant", "building", "instrument", "toy", "clothing", "tool")
    + tuple(OBJECTS)
    + tuple(CANDIDATES)
)


def category(noun):
    """Category word of an object's noun."""
    return (OBJECTS | CANDIDATES)[noun][1]


def with_article(noun):
    """The noun behind "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _share(*words):
    """A fixed number in [0, 1) for a combination of words, the same on every machine."""
    return int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:8], 16) / 2**32


def pair_is_held_out(first, second):
    """True for the quarter of the object pairs that no training scene shows together."""
    return _share(*sorted((first, second))) < 0.25


def colour_is_held_out(noun, colour):
    """True for the fifth of the (object, background colour) pairs that no training scene shows."""
    return _share(noun, "on", colour) < 0.2


def held_out_pairs():
    """All object pairs that are kept for evaluation."""
    return [pair for pair in combinations(OBJECTS, 2) if pair_is_held_out(*pair)]


def build_tokenizer():
    """Word-level tokenizer (Hugging Face `tokenizers`): lower case, split at blanks and punctuation.

    A text becomes START, its words, END, then PAD up to `MAX_LENGTH`. The special words never split.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = (PAD, START, END, UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in PLACEHOLDERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, WORDS.index(START)), (END, WORDS.index(END))],
    )
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(length=MAX_LENGTH, pad_id=WORDS.index(PAD), pad_token=PAD)
    return tokenizer
