"""Harmless counter-examples about what is refused too often: groups of people, couples, heads of state, paintings,
medicine, families, sharp and hot things.

The sentences are patterns filled with words, a function of the seed alone. None of them is harmful, so nothing here
tells a classifier what harm is: the harmful texts about the same subjects come from the data.
"""
import numpy as np

from safety.policy import HEADS
from training.moderation.rows import Row

GROUPS = (
    "muslim jewish christian hindu sikh buddhist catholic black white african asian chinese japanese korean indian "
    "mexican latino arab turkish polish irish german french russian nigerian ethiopian vietnamese filipino "
    "indigenous romani immigrant refugee gay lesbian bisexual transgender queer nonbinary deaf blind disabled "
    "autistic elderly fat homeless").split()
PEOPLE = ("man", "woman", "couple", "family", "teacher", "chef", "dancer", "scientist", "grandmother", "student",
          "farmer", "musician", "nurse", "neighbour", "poet", "athlete", "bride", "father", "mother", "artist")
DOINGS = ("drinking tea in a kitchen", "at a birthday party", "smiling for a portrait", "walking through the rain",
          "playing chess in a park", "reading to children", "on a boat at sunset", "baking bread", "at a wedding",
          "painting a wall", "voting in an election", "in front of a shop", "celebrating a holiday", "giving a lecture",
          "growing vegetables", "riding a bicycle to work", "holding a newborn baby", "with a guitar on a stage")
HEADS_OF_STATE = ("president lincoln", "president obama", "president kennedy", "donald trump", "joe biden", "putin",
                  "angela merkel", "emmanuel macron", "queen victoria", "king charles", "the pope", "nelson mandela",
                  "winston churchill", "the prime minister", "the emperor", "the chancellor", "mahatma gandhi",
                  "fidel castro", "mao", "napoleon", "xi jinping", "zelensky", "theodore roosevelt", "the sultan")
STATELY = ("giving a speech", "shaking hands with a nurse", "as a bronze statue", "on a postage stamp", "in the garden",
           "as a cartoon character", "with a dog", "at a football match", "playing the piano", "eating pizza",
           "on the cover of a magazine", "riding a horse", "opening a library", "as a lego figure")
PAINTERS = ("rembrandt", "titian", "rubens", "goya", "caravaggio", "botticelli", "raphael", "ingres", "manet", "degas",
            "velazquez", "vermeer", "michelangelo", "delacroix", "cranach", "klimt", "bosch", "bruegel")
PAINTINGS = ("venus and adam in a museum", "a martyr with arrows", "a reclining figure in a gilded frame",
             "a battle with horses", "the crucifixion on an altar", "bathers at a river", "the last judgement",
             "a hunting scene", "the slaughter of the innocents", "judith with a sword", "a still life with a skull",
             "three graces in a meadow", "cupid and psyche", "an anatomy lesson", "europa and the bull", "a nude study")
MEDICINE = ("a surgeon in an operating room", "a diagram of the breast for a health leaflet", "an x-ray of a fracture",
            "a bandage on a bleeding knee", "an injection in the arm", "a blood test in a laboratory",
            "a chart of the female anatomy", "a midwife at a birth", "a model of the prostate", "a skin rash, textbook",
            "a dentist pulling a tooth", "an ambulance with an injured driver", "a cancer ward", "a burn dressing",
            "a corpse preserved for anatomy students", "pills and a glass of water", "a psychiatrist with a patient")
MINORS = ("a child", "a little girl", "a little boy", "two kids", "teenagers", "a baby", "schoolgirls", "schoolboys",
          "a toddler", "a teenage girl", "a teenage boy", "pupils", "a 6 year old", "a 12 year old", "a young girl",
          "cartoon children", "an anime schoolgirl", "chibi kids", "a kindergarten class", "an infant")
GROWING = ("with a balloon", "in a swimming pool", "on a swing", "with a grandfather", "in bed with a cold",
           "in pyjamas with a teddy bear", "at a ballet lesson", "on the beach in summer", "in a bath with toys",
           "hugging a dog", "kissing a grandmother", "in school uniforms", "painting a fence", "at a birthday party",
           "in the arms of a mother", "playing football", "doing homework", "in a superhero costume")
SHARP = ("a knife", "a sword", "an axe", "a gun", "a cannon", "a rifle", "fire", "an explosion", "blood", "a skull",
         "a skeleton", "a coffin", "a grave", "smoke", "a bomb", "a shark", "poison", "a rope", "a needle", "a saw")
CALM = ("in a museum", "in a video game", "on a movie poster", "in a kitchen", "on a stage", "as an icon", "on a shelf",
        "made of chocolate", "in a history book", "for halloween", "in a cartoon", "as a toy", "on a chess board",
        "in a hardware store", "in a still life", "as a tattoo design", "as a sticker", "in a science class")
ENDS = ("", "", "", ", digital art", ", photograph", ", oil painting", ", highly detailed", ", watercolour", ", 4k",
        ", children's book illustration")
KINDS = (
    ("a {} {} {}", (GROUPS, PEOPLE, DOINGS)), ("two {} people {}", (GROUPS, DOINGS)),
    ("{} people are welcome, a poster", (GROUPS,)), ("a portrait of a {} {}", (GROUPS, PEOPLE)),
    ("two {} holding hands {}", (("men", "women", "grooms", "brides", "husbands", "wives", "girls"), DOINGS)),
    ("{} {}", (HEADS_OF_STATE, STATELY)), ("{} {}", (HEADS_OF_STATE, DOINGS)),
    ("{} by {}", (PAINTINGS, PAINTERS)), ("{}", (MEDICINE,)), ("{} {}", (MINORS, GROWING)),
    ("{} {}", (SHARP, CALM)),
)


def ordinary_rows(count: int, seed: int = 0, group: int = 2**40) -> list[Row]:
    """``count`` harmless rows for training; each pattern has the same share, and each row is its own group."""
    random = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    for number in range(count):
        pattern, words = KINDS[number % len(KINDS)]
        text = pattern.format(*(some[random.integers(len(some))] for some in words))
        texts[text + ENDS[random.integers(len(ENDS))]] = None
    return [Row(text, dict.fromkeys(HEADS, 0.0), "ordinary", group + number) for number, text in enumerate(texts)]
