"""Makes the quick start's task: plain commands to a house, answered by one line of JSON.

    python3 xtask/quickstart/make.py

Writes train.jsonl, valid.jsonl and test.jsonl beside itself, the same bytes every time. No command is there twice,
so the test has none of training's; and for about half of the test even the phrasing is one that training never shows.
"""

import json
import random
from pathlib import Path

SIZES = {"train": 400, "valid": 40, "test": 60}

ROOMS = ["kitchen", "bedroom", "living room", "hallway", "bathroom", "study", "garage", "attic", "nursery", "cellar"]
DOORS = ["front door", "back door", "garage door", "garden gate", "cellar door", "balcony door"]
GENRES = ["jazz", "rock", "soul", "techno", "folk", "blues", "opera", "reggae", "disco", "piano music"]
ITEMS = ["apples", "eggs", "onions", "lemons", "candles", "batteries", "tomatoes", "sponges", "bananas", "potatoes",
         "pears", "carrots"]
LABELS = ["pasta", "rice", "tea", "pizza", "bread", "laundry", "cake", "soup", "oven", "potatoes"]
LEVELS = range(5, 100, 5)
DEGREES = range(15, 27)
MINUTES = range(2, 60)
AMOUNTS = range(2, 13)

# An intent: its slots, what it answers, its phrasings, and those that only the test shows.
INTENTS = [
    (
        {"room": ROOMS, "level": LEVELS},
        {"call": "set_light", "room": "{room}", "level": "{level}"},
        [
            "Dim the {room} lights to {level} percent.",
            "Set the {room} lights to {level} percent.",
            "Put the {room} light at {level} percent.",
            "Make the lights in the {room} {level} percent bright.",
            "{level} percent light in the {room}, please.",
            "I want the {room} lamp at {level} percent.",
        ],
        ["Bring the {room} lights to {level} percent.", "Could you set the {room} lamp to {level} percent?"],
    ),
    (
        {"room": ROOMS, "on": [("on", True), ("off", False)]},
        {"call": "switch_light", "room": "{room}", "on": "{on}"},
        [
            "Turn {on} the {room} lights.",
            "Switch the {room} lights {on}.",
            "Please turn the light in the {room} {on}.",
            "Lights {on} in the {room}.",
            "Switch {on} the lamp in the {room}.",
            "I need the {room} light {on}.",
        ],
        ["Can you turn {on} the light in the {room}?", "The {room} lights should be {on}."],
    ),
    (
        {"room": ROOMS, "degrees": DEGREES},
        {"call": "set_heating", "room": "{room}", "degrees": "{degrees}"},
        [
            "Heat the {room} to {degrees} degrees.",
            "Set the {room} to {degrees} degrees.",
            "Make it {degrees} degrees in the {room}.",
            "I want {degrees} degrees in the {room}.",
            "Turn the heating in the {room} to {degrees} degrees.",
            "Please warm the {room} to {degrees} degrees.",
        ],
        ["Keep the {room} at {degrees} degrees.", "Could you make the {room} {degrees} degrees warm?"],
    ),
    (
        {"room": ROOMS, "open": [("open", True), ("close", False)]},
        {"call": "move_blinds", "room": "{room}", "open": "{open}"},
        [
            "{Open} the blinds in the {room}.",
            "{Open} the {room} blinds.",
            "Please {open} the {room} blinds.",
            "Could you {open} the blinds in the {room}?",
            "In the {room}, {open} the blinds.",
            "I want you to {open} the {room} blinds.",
        ],
        ["Time to {open} the blinds in the {room}.", "{Open} all blinds of the {room}, please."],
    ),
    (
        {"door": DOORS, "locked": [("lock", True), ("unlock", False)]},
        {"call": "lock", "door": "{door}", "locked": "{locked}"},
        [
            "{Locked} the {door}.",
            "Please {locked} the {door}.",
            "Could you {locked} the {door}?",
            "Go and {locked} the {door}.",
            "I want you to {locked} the {door}.",
            "{Locked} the {door} right now.",
            "{Locked} the {door} for me.",
        ],
        ["Be so kind and {locked} the {door}.", "{Locked} our {door}, please."],
    ),
    (
        {"room": ROOMS, "genre": GENRES},
        {"call": "play", "room": "{room}", "genre": "{genre}"},
        [
            "Play some {genre} in the {room}.",
            "Play {genre} in the {room}.",
            "I want to hear {genre} in the {room}.",
            "Put on {genre} in the {room}.",
            "Start playing {genre} in the {room}.",
            "In the {room}, play {genre}.",
        ],
        ["Let us hear some {genre} in the {room}.", "Could you play {genre} in the {room}?"],
    ),
    (
        {"minutes": MINUTES, "label": LABELS},
        {"call": "set_timer", "minutes": "{minutes}", "label": "{label}"},
        [
            "Set a timer of {minutes} minutes for the {label}.",
            "Set a {label} timer for {minutes} minutes.",
            "Start a {minutes} minute timer for the {label}.",
            "Remind me of the {label} in {minutes} minutes.",
            "The {label} needs {minutes} minutes, set a timer.",
            "Timer for the {label}, {minutes} minutes.",
        ],
        ["Give the {label} a timer of {minutes} minutes.", "Tell me about the {label} in {minutes} minutes."],
    ),
    (
        {"amount": AMOUNTS, "item": ITEMS},
        {"call": "add_to_list", "item": "{item}", "amount": "{amount}"},
        [
            "Add {amount} {item} to the shopping list.",
            "Put {amount} {item} on the shopping list.",
            "We need {amount} {item}.",
            "Write down {amount} {item}.",
            "Please add {amount} {item} to my list.",
            "I have to buy {amount} {item}.",
        ],
        ["Note that we need {amount} {item}.", "{amount} {item} should go on the shopping list."],
    ),
]


def fill(intent, phrasing, rng):
    """A command and its answer."""
    slots, answer, *_ = intent
    said, meant = {}, {}
    for name, values in slots.items():
        value = rng.choice(values)
        said[name], meant[name] = value if isinstance(value, tuple) else (value, value)
        said[name.capitalize()] = str(said[name]).capitalize()
    call = {key: meant.get(value[1:-1], value) for key, value in answer.items()}
    command = phrasing.format(**said)
    return command[0].upper() + command[1:], json.dumps(call, separators=(",", ":"))


def rows(split, size, seen):
    rng = random.Random(f"quickstart {split}")
    made = []
    while len(made) < size:
        intent = INTENTS[len(made) % len(INTENTS)]
        known, unknown = intent[2:]
        # Turn by turn through the intents, so that every second round is of unknown phrasings.
        of_test = split == "test" and len(made) // len(INTENTS) % 2 == 1
        command, answer = fill(intent, rng.choice(unknown if of_test else known), rng)
        if command not in seen:
            seen.add(command)
            made.append((command, answer))
    return made


def main():
    seen = set()
    for split, size in SIZES.items():
        with open(Path(__file__).with_name(f"{split}.jsonl"), "w", encoding="utf-8", newline="\n") as file:
            for command, answer in rows(split, size, seen):
                messages = [
                    {"role": "user", "content": command},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
