"""What scenes are made of: the objects with their sprites, colours and habitats, and the places."""

from dataclasses import dataclass

LAND = ("meadow", "desert", "beach", "snow", "mountains")
AIR = ("meadow", "desert", "beach", "snow", "mountains")
PLACES = (*LAND, "sea", "space")


@dataclass(frozen=True)
class Paint:
    """Pixels that take a colour: ranges of hue in degrees (may wrap), saturation and value in [0, 1]."""

    hue: tuple[float, float] = (0, 360)
    saturation: tuple[float, float] = (0.3, 1)
    value: tuple[float, float] = (0.3, 1)


@dataclass(frozen=True)
class Entry:
    """An object of the catalogue.

    `icon` names the drawing in the Fluent Emoji package. `own` are the colours it has by nature, which plain
    backgrounds must not have. `places` are where it may be; there it stands on the ground unless `flies`.
    `paint` says which pixels take a colour and `colors` which colours they may take.
    """

    noun: str
    icon: str
    own: tuple[str, ...]
    places: tuple[str, ...] = LAND
    flies: bool = False
    plural: str = ""
    paint: Paint | None = None
    colors: tuple[str, ...] = ()
    synonym: str = ""

    @property
    def many(self) -> str:
        """The plural of the noun."""
        return self.plural or self.noun + "s"


RAINBOW = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
ANY = (*RAINBOW, "white", "black")
REDS = Paint(hue=(315, 25), saturation=(0.35, 1), value=(0.35, 1))
PALE = Paint(saturation=(0, 0.24), value=(0.5, 1))

CATALOGUE = (
    Entry("fox", "fox", ("orange",), plural="foxes"),
    Entry("cat", "cat-face", ("yellow", "orange"), (*LAND, "space"), synonym="kitten"),
    Entry("dog", "dog-face", ("brown",), (*LAND, "space"), synonym="puppy"),
    Entry("panda", "panda", ("white",), (*LAND, "space")),
    Entry("lion", "lion", ("brown",)),
    Entry("rabbit", "rabbit-face", ("white", "gray"), synonym="bunny"),
    Entry("penguin", "penguin", ("purple",)),
    Entry("owl", "owl", ("black",)),
    Entry("frog", "frog", ("green",)),
    Entry("turtle", "turtle", ("green",), (*LAND, "sea")),
    Entry("horse", "horse", ("black",)),
    Entry("elephant", "elephant", ("gray",)),
    Entry("giraffe", "giraffe", ("orange",)),
    Entry("duck", "duck", ("green", "gray")),
    Entry("pig", "pig", ("pink",)),
    Entry("dolphin", "dolphin", ("blue",), ("sea",), flies=True),
    Entry(
        "octopus",
        "octopus",
        ("orange", "pink"),
        ("sea", "space"),
        flies=True,
        plural="octopuses",
        paint=Paint(hue=(285, 60), saturation=(0.15, 1)),
        colors=("red", "yellow", "green", "blue", "purple", "pink"),
    ),
    Entry("whale", "spouting-whale", ("blue",), ("sea",), flies=True),
    Entry("crab", "crab", ("pink", "red"), ("beach", "sea", "desert"), paint=REDS, colors=RAINBOW),
    Entry(
        "fish",
        "fish",
        ("blue",),
        ("sea",),
        flies=True,
        plural="fish",
        paint=Paint(hue=(180, 250), saturation=(0.25, 1)),
        colors=(*RAINBOW, "white"),
    ),
    Entry(
        "butterfly",
        "butterfly",
        ("orange", "black"),
        AIR,
        flies=True,
        plural="butterflies",
        paint=Paint(hue=(340, 50), saturation=(0.5, 1), value=(0.5, 1)),
        colors=(*RAINBOW, "white"),
    ),
    Entry("bee", "honeybee", ("yellow", "black"), AIR, flies=True),
    Entry("bird", "bird", ("pink", "red"), paint=Paint(hue=(270, 8), saturation=(0.35, 1)), colors=ANY),
    Entry("tree", "deciduous-tree", ("green",)),
    Entry("cactus", "cactus", ("green",), plural="cactuses"),
    Entry("sunflower", "sunflower", ("yellow",)),
    Entry(
        "tulip",
        "tulip",
        ("pink", "purple"),
        paint=Paint(hue=(270, 350), saturation=(0.3, 1)),
        colors=("red", "orange", "yellow", "purple", "pink", "white"),
    ),
    Entry("mushroom", "mushroom", ("red",), paint=Paint(hue=(300, 15), saturation=(0.45, 1)), colors=RAINBOW),
    Entry(
        "apple",
        "red-apple",
        ("red",),
        paint=Paint(hue=(310, 25), saturation=(0.3, 1)),
        colors=("red", "yellow", "green"),
    ),
    Entry("banana", "banana", ("yellow",)),
    Entry("strawberry", "strawberry", ("red", "pink"), plural="strawberries"),
    Entry("hamburger", "hamburger", ("brown",), (*LAND, "space"), synonym="burger"),
    Entry("pizza", "pizza", ("yellow", "orange"), (*LAND, "space")),
    Entry(
        "doughnut",
        "doughnut",
        ("brown",),
        (*LAND, "space"),
        synonym="donut",
        paint=Paint(hue=(335, 27), saturation=(0.15, 0.8), value=(0.15, 0.8)),
        colors=("red", "green", "blue", "purple", "pink", "white"),
    ),
    Entry("car", "automobile", ("red", "pink"), (*LAND, "space"), paint=REDS, colors=ANY),
    Entry(
        "bus",
        "bus",
        ("orange", "yellow"),
        plural="buses",
        paint=Paint(hue=(10, 60), saturation=(0.4, 1), value=(0.5, 1)),
        colors=RAINBOW,
    ),
    Entry("rocket", "rocket", ("white",), (*LAND, "space"), flies=True, paint=PALE, colors=RAINBOW),
    Entry("airplane", "airplane", ("blue", "gray"), AIR, flies=True, synonym="plane"),
    Entry("balloon", "balloon", ("red",), AIR, flies=True, paint=Paint(hue=(255, 30), saturation=(0.1, 1)), colors=ANY),
    Entry(
        "house",
        "house",
        ("orange",),
        paint=Paint(hue=(0, 45), saturation=(0.25, 1), value=(0.6, 1)),
        colors=(*RAINBOW, "white"),
    ),
    Entry("castle", "castle", ("gray", "pink")),
    Entry("snowman", "snowman-without-snow", ("white",), plural="snowmen"),
    Entry("robot", "robot", ("white", "gray"), (*LAND, "space", "sea"), paint=PALE, colors=RAINBOW),
    Entry("ghost", "ghost", ("white",), (*LAND, "space"), flies=True),
    Entry(
        "gift",
        "wrapped-gift",
        ("yellow", "orange"),
        (*LAND, "space"),
        synonym="present",
        paint=Paint(hue=(22, 62), saturation=(0.4, 1), value=(0.5, 1)),
        colors=("orange", "yellow", "green", "blue", "purple", "pink", "white", "black"),
    ),
    Entry(
        "guitar",
        "guitar",
        ("pink", "red"),
        (*LAND, "space"),
        paint=Paint(hue=(320, 10), saturation=(0.4, 1)),
        colors=ANY,
    ),
    Entry("umbrella", "umbrella", ("purple",), paint=Paint(hue=(240, 300), saturation=(0.25, 1)), colors=ANY),
    Entry(
        "heart", "red-heart", ("red", "pink"), (*AIR, "space"), flies=True, paint=Paint(saturation=(0.2, 1)), colors=ANY
    ),
)
