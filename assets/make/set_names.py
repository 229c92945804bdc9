"""What icon sets call an emoji where neither its caption nor its Unicode name tells; None: what bears that name is
another thing."""

OTHER_NAMES = {
    "firefox": {
        "cat": "catside", "dog": "dogside", "mouse": "mouseside", "pig": "pigside", "tiger": "tigerside",
        "leopard": "leopardside", "rabbit": "bunnyside", "rabbit face": "bunny", "dragon": "dragonside",
        "dragon face": "dragonhead", "hamster": "hampster", "pig nose": "pigsnout",
        "evergreen tree": "evergreen", "hot pepper": "chilipepper", "fallen leaf": "fallingleaf",
        "ribbon": "bow", "wrapped gift": "present", "confetti ball": "confetti", "studio microphone": "studiomic",
        "tennis": None, "keyboard": None, "game die": None, "window": None, "sunglasses": "darksunglasses",
        "racing car": "racecar", "necktie": "tie", "t-shirt": "mansshirt",
        "woman's clothes": "womansshirt", "man's shoe": "mensshoe", "running shoe": "mensrunner",
        "woman's sandal": "sandals", "two hearts": "2hearts", "blue heart": None, "green heart": "heartgreen",
        "yellow heart": "heartyellow", "purple heart": "heartpurple", "sweat droplets": "sweatsplash",
        "speech balloon": "speechbubble", "thought balloon": "thoughtbaloon", "yen banknote": "banknoteyen",
        "dollar banknote": "banknotedollar", "euro banknote": "banknoteeuro", "pound banknote": "banknotepound",
        "floppy disk": "floppydisk2", "chart increasing": "chartupwardstrend",
        "chart decreasing": "chartdownwardstrend", "telephone receiver": "telephonereceiver2",
        "mobile phone": "cellphone", "video camera": "handheldvideocamera", "muted speaker": "speakercancellation",
        "mantelpiece clock": "manltepiececlock", "grinning face": "grinwide", "winking face": "winking",
        "neutral face": "neutral", "enraged face": "pouting", "crying face": "crying",
        "persevering face": "perservere", "anguished face": "anguish", "tired face": "tired",
        "bullet train": "highspeedtrainbulletnose", "sun": "sunrays", "high voltage": "bolt",
        "snowman": "snowmanwithoutsnow",
        "pile of poo": "poo", "bed": None, "umbrella": "umbrellawithraindrops", "cat face": "cat", "dog face": "dog",
        "mouse face": "mouse", "pig face": "pig", "tiger face": "tiger", "cow face": "cow", "monkey face": "monkey",
        "horse face": "horse", "goblin": "japaneseangrymask", "jack-o-lantern": "jackolantern",
    },
    "blob": {"cricket": None},
    "emojione": {"cricket": None},
    "streamline": {"turkey": None},
}  # fmt: skip
