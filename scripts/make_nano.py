"""Make *nano*: a tiny base model's files, its primer, and the task that fine-tuning teaches it.

The task turns a request in plain English into a JSON call:

    remind me to water the plants tomorrow at 7:30 pm
    {"call": "set_reminder", "task": "water the plants", "day": "tomorrow", "time": "19:30"}

What this script writes, byte for byte the same for a given seed:

    nano/train.jsonl, valid.jsonl, test.jsonl   the task, rows of {"messages": [...]}
    nano/model/                                 config.json and the tokenizer (no weights)
    outputs/nano_primer/primer.jsonl            general skills the base is pretrained on

Phrasings (templates) and values (names, titles, places, clock times, amounts, ...) of the valid and
test splits never occur in train, and the primer holds no call, no phrasing of the task and none of
the held-out values: `check_disjoint` and `check_primer` assert it on the rows themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

Message = dict[str, str]
Row = dict[str, list[Message]]
Spoken = tuple[str, Any]  # how a value is said, and the JSON value it stands for
Pools = dict[str, list[Any]]  # kind of value -> the values one split may use

SPLITS: Final = ("train", "valid", "test")


def listed(text: str, sep: str | None = None) -> list[str]:
    """The words of a table of words; or its items between `sep`, line breaks undone."""
    return text.split() if sep is None else [" ".join(item.split()) for item in text.split(sep)]


# --------------------------------------------------------------------------- the task: phrasings


@dataclass(frozen=True)
class Call:
    """One kind of call: its fields in the order they are written, its phrasings per split."""

    name: str
    fields: tuple[str, ...]
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]

    def phrasings(self, split: str) -> tuple[str, ...]:
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]


CALLS: Final = (
    Call(
        "set_reminder",
        ("task", "day", "time"),
        train=(
            "remind me to {task} {on_day} at {time}",
            "remind me {on_day} at {time} to {task}",
            "set a reminder to {task} {on_day} at {time}",
            "set a reminder for {day} at {time} to {task}",
            "i need a reminder to {task} at {time} {on_day}",
            "{on_day} at {time} i have to {task}, remind me",
            "do not let me forget to {task} {on_day} at {time}",
            "make sure that i {task} {on_day} at {time}",
            "at {time} {on_day} remind me that i must {task}",
            "i must {task} {on_day} at {time}, so remind me",
            "give me a reminder {on_day} at {time}: {task}",
            "add a reminder for {day}, {time}: {task}",
            "i want you to remind me to {task} at {time} {on_day}",
            "i should not forget to {task}, remind me {on_day} at {time}",
            "i have to {task}, set a reminder for {day} at {time}",
            "{on_day} at {time}: reminder to {task}",
            "can you remind me that i have to {task} {on_day} at {time}",
            "i want to {task} {on_day} at {time}, do not let me forget it",
            "make a reminder for me to {task} at {time} {on_day}",
            "could you set a reminder at {time} {on_day} to {task}",
        ),
        valid=(
            "i have to {task} {on_day} at {time}, give me a reminder",
            "for {day} at {time}, remind me to {task}",
        ),
        test=(
            "could you remind me to {task} at {time} {on_day}",
            "i want a reminder {on_day} at {time} to {task}",
            "make sure i do not forget to {task} at {time} {on_day}",
            "remind me at {time} {on_day} that i have to {task}",
        ),
    ),
    Call(
        "book_table",
        ("place", "people", "day", "time"),
        train=(
            "book a table for {people} at {place} {on_day} at {time}",
            "book a table at {place} for {people} {on_day} at {time}",
            "reserve a table for {people} at {place}, {day} at {time}",
            "get us a table at {place} {on_day} at {time} for {people} people",
            "we are {people} people, book {place} for {day} at {time}",
            "i want to eat at {place} {on_day} at {time}, a table for {people}",
            "table for {people} at {place}, {day}, {time}",
            "find a table at {place} for {people} people at {time} {on_day}",
            "make a booking at {place} for {day} at {time}, {people} people",
            "{on_day} at {time} we eat at {place}, book for {people}",
            "reserve {place} for {people} people {on_day} at {time}",
            "a dinner for {people} at {place} {on_day} at {time}, book it",
            "i need a table for {people} people at {time} {on_day} at {place}",
            "we would like a table at {place} at {time} {on_day} for {people}",
            "could you book {place} for {people} {on_day} at {time}",
            "reserve a table {on_day} at {time} at {place}, we are {people}",
            "we want a table for {people} people at {place} {on_day} at {time}",
            "i would like to eat at {place} at {time} {on_day} with {people} people",
            "find us a table at {place} {on_day} at {time}, {people} people",
            "at {time} {on_day} i need {place} for {people}",
        ),
        valid=(
            "we need a table for {people} at {place} {on_day} at {time}",
            "book {place} {on_day} at {time}, we are {people}",
        ),
        test=(
            "reserve a table at {place} {on_day} at {time} for {people}",
            "we want to eat at {place} {on_day} at {time}, {people} people",
            "make a booking for {people} at {place} for {day} at {time}",
            "could you find us a table for {people} people at {place} at {time} {on_day}",
        ),
    ),
    Call(
        "send_money",
        ("to", "amount", "currency"),
        train=(
            "send {money} to {to}",
            "send {to} {money}",
            "pay {to} {money}",
            "transfer {money} to {to}",
            "i owe {to} {money}, send it",
            "give {to} {money} from my account",
            "wire {money} to {to}",
            "{to} needs {money} from me",
            "make a payment of {money} to {to}",
            "pay {money} to {to}",
            "pay {to} back, it was {money}",
            "move {money} from my account to {to}",
            "i have to pay {to} {money}",
            "{to} paid {money} for me, send it back",
            "i want to transfer {money} to {to}",
            "{to} should have {money}, send it from my account",
            "could you send {to} {money}",
            "make a payment to {to} of {money}",
            "{money} for {to}, send it",
            "i owe {to} {money}, pay it back",
        ),
        valid=("i want to pay {money} to {to}", "transfer to {to} the {money} i owe"),
        test=(
            "i owe {money} to {to}, pay it back",
            "make a transfer of {money} to {to}",
            "i want to send {money} to {to}",
            "{to} should get {money} from my account",
        ),
    ),
    Call(
        "play_music",
        ("title", "artist", "room"),
        train=(
            "play {title} by {artist} in the {room}",
            "put on {title} by {artist} in the {room}",
            "in the {room}, play {title} by {artist}",
            "i want to hear {title} by {artist} in the {room}",
            "play the song {title} by {artist} on the {room} speaker",
            "start {title} from {artist} in the {room}",
            "{artist} in the {room}, the song {title}",
            "play {artist} in the {room}, the song is {title}",
            "let me listen to {title} by {artist} in the {room}",
            "use the {room} speaker to play {title} by {artist}",
            "some music for the {room}: {title} by {artist}",
            "play me {title}, the song by {artist}, in the {room}",
            "on the {room} speaker i want {title} by {artist}",
            "start playing music in the {room}: {artist}, {title}",
            "could you play {title} by {artist} in the {room}",
            "start the song {title} by {artist} in the {room}",
            "put {artist} on in the {room}, the song {title}",
            "in the {room} i want to listen to {title} from {artist}",
            "on the speaker in the {room}, put on {title} by {artist}",
            "i want {title} by {artist} to play in the {room}",
        ),
        valid=(
            "play {title} from {artist} on the speaker in the {room}",
            "the song {title} by {artist} in the {room}",
        ),
        test=(
            "i want to listen to {title} by {artist} in the {room}",
            "on the {room} speaker, play {title} by {artist}",
            "put on the song {title} from {artist} in the {room}",
            "in the {room} start playing {title} by {artist}",
        ),
    ),
    Call(
        "get_weather",
        ("city", "day"),
        train=(
            "what is the weather in {city} {on_day}",
            "how is the weather in {city} {on_day}",
            "weather in {city} for {day}",
            "will it rain in {city} {on_day}",
            "do i need an umbrella in {city} {on_day}",
            "tell me the weather for {city} {on_day}",
            "is it going to be cold in {city} {on_day}",
            "give me the forecast for {city} {on_day}",
            "{on_day}, what is the weather like in {city}",
            "i am going to {city} {on_day}, how is the weather",
            "how warm will it be in {city} {on_day}",
            "check the forecast in {city} {on_day}",
            "i will be in {city} {on_day}, is it going to rain",
            "show me what the weather will be {on_day} in {city}",
            "could you check the weather in {city} {on_day}",
            "will i need an umbrella {on_day} in {city}",
            "what is it going to be like {on_day} in {city}, warm or cold",
            "forecast for {city} {on_day}",
            "is {city} going to be warm {on_day}",
            "show me the weather {on_day} for {city}",
        ),
        valid=("will it be cold in {city} {on_day}", "check the weather for {day} in {city}"),
        test=(
            "is it going to be warm in {city} {on_day}",
            "what will the weather be like in {city} {on_day}",
            "show me the forecast for {city} for {day}",
            "i am going to be in {city} {on_day}, do i need an umbrella",
        ),
    ),
    Call(
        "create_event",
        ("title", "day", "time", "minutes"),
        train=(
            "schedule {event} {on_day} at {time} for {minutes}",
            "add {event} to my calendar {on_day} at {time} for {minutes}",
            "put {event} in my calendar for {day} at {time}, {minutes}",
            "create an event called {event} {on_day} at {time}, it takes {minutes}",
            "i have {event} {on_day} at {time} for {minutes}, add it",
            "block {minutes} {on_day} at {time} for {event}",
            "new event: {event}, {day}, {time}, {minutes}",
            "plan {event} {on_day} at {time}, it lasts {minutes}",
            "in my calendar, add {minutes} of {event} {on_day} at {time}",
            "{on_day} at {time} there is {event} for {minutes}, put it in my calendar",
            "schedule {minutes} for {event} at {time} {on_day}",
            "make an event at {time} {on_day} for {event}, {minutes} long",
            "plan {minutes} of {event} for {day} at {time}",
            "create {event} at {time} {on_day} and block {minutes}",
            "could you add {event} {on_day} at {time} for {minutes}",
            "put {minutes} for {event} in my calendar at {time} {on_day}",
            "an event called {event}, {on_day} at {time}, {minutes}",
            "schedule {event} at {time} {on_day}, it lasts {minutes}",
            "{event} is {on_day} at {time} and takes {minutes}, add it to my calendar",
            "add an event for {day} at {time}: {event}, {minutes}",
        ),
        valid=(
            "add an event for {event} {on_day} at {time}, it lasts {minutes}",
            "block my calendar {on_day} at {time} for {event}, {minutes}",
        ),
        test=(
            "put {event} in my calendar at {time} {on_day} for {minutes}",
            "schedule {event} for {day} at {time}, it takes {minutes}",
            "plan an event called {event} {on_day} at {time} for {minutes}",
            "add {minutes} for {event} to my calendar {on_day} at {time}",
        ),
    ),
    Call(
        "send_message",
        ("to", "text"),
        train=(
            "tell {to} that {text}",
            "text {to} that {text}",
            "send {to} a message saying {text}",
            "let {to} know that {text}",
            "message {to}: {text}",
            "send a message to {to} that says {text}",
            "write to {to} that {text}",
            "send a text to {to}: {text}",
            "say to {to} that {text}",
            "i want {to} to know that {text}",
            "text {to}: {text}",
            "write {to} a note saying {text}",
            "please let {to} know this: {text}",
            "send {to} the message {text}",
            "could you tell {to} that {text}",
            "let {to} know by text that {text}",
            "write {to} that {text}",
            "i want to let {to} know that {text}",
            "send this message to {to}: {text}",
            "write a text to {to} that says {text}",
        ),
        valid=("message {to} that {text}", "send a text to {to} saying {text}"),
        test=(
            "let {to} know: {text}",
            "send {to} a text that says {text}",
            "write a message to {to} saying {text}",
            "i want to tell {to} that {text}",
        ),
    ),
    Call(
        "set_timer",
        ("label", "minutes"),
        train=(
            "set a timer for the {label} for {minutes}",
            "start a {label} timer for {minutes}",
            "count down {minutes} for the {label}",
            "the {label} needs {minutes}, set a timer",
            "timer for the {label}, {minutes}",
            "set the {label} timer to {minutes}",
            "i need a timer of {minutes} for the {label}",
            "time the {label} for {minutes}",
            "call the timer {label} and set it to {minutes}",
            "{minutes} for the {label}, start a timer",
            "let me know when the {label} has had {minutes}",
            "start counting {minutes} for the {label} now",
            "the {label} takes {minutes}, start counting",
            "give the {label} {minutes} on the timer",
            "could you set a timer of {minutes} for the {label}",
            "i need a {label} timer, {minutes}",
            "start counting down {minutes}, it is for the {label}",
            "{minutes} on the timer for the {label}",
            "the timer for the {label} should be {minutes}",
            "set {minutes} for the {label}",
        ),
        valid=(
            "start a timer of {minutes} for the {label}",
            "the {label} takes {minutes}, time it",
        ),
        test=(
            "set a {label} timer for {minutes}",
            "start a timer for the {label}, it needs {minutes}",
            "i need {minutes} on the timer for the {label}",
            "count {minutes} down for the {label} now",
        ),
    ),
)

# The calls of the committed task. The other three ask for long names to be copied whole, which a
# base of this size does in one to four cases of five only; `--calls` makes them part of it.
TAUGHT: Final = ("set_reminder", "book_table", "send_money", "send_message", "set_timer")

# What may stand before a request; "" is the only one the splits share.
OPENERS: Final = {
    "train": (
        *("", "", "", "", "please ", "hey, ", "ok, ", "now ", "hi there, ", "so, ", "well then, "),
        *("good morning, ", "next task: ", "and also ", "by the way, ", "a small request: "),
    ),
    "valid": ("", "", "listen, "),
    "test": ("", "", "hello, ", "one more thing: "),
}

# What may stand behind a request that does not end in free words.
CLOSERS: Final = {
    "train": (*[""] * 8, " please", ", thanks", " right away", ", ok?", " at once", " if you can"),
    "valid": ("",),
    "test": ("",),
}

# --------------------------------------------------------------------------- the task: values

OPEN_VALUES: Final = {
    "task": """water the plants|call the plumber|pay the rent|feed the cat|renew my passport|
wash the car|buy some milk|pick up the laundry|take out the trash|clean the oven|send the invoice|
back up the laptop|charge the camera|return the library books|walk the dog|book the flights|
order new glasses|fix the bike|change the sheets|print the tickets|mow the lawn|iron my shirts|
empty the dishwasher|sign the contract|pack my suitcase|visit my grandmother|study for the exam|
check the smoke alarm|defrost the chicken|lock the shed|buy a birthday card|cancel the gym|
update my resume|bake a cake|collect the parcel|vacuum the stairs|replace the light bulb|
sharpen the knives|prune the roses|post the letters|cut my nails|clean the aquarium|
practice the violin|call my landlord|tidy the attic|oil the door hinges|scan the receipts|
record the podcast|rotate the tires|refill the printer|sweep the chimney|stretch my back|
drop off the keys|book a haircut|descale the kettle|check the mailbox|sew the buttons|
polish my boots|rake the leaves|file my taxes|measure the curtains|paint the fence|order cat food|
unplug the heater|sort the recycling|email the teacher|clear the gutters|thank the neighbours|
freeze the soup|grade the essays|mend the curtain rod|burp the baby|weigh the luggage|
rinse the lentils""",
    "place": """Golden Fern|Luigi's|The Blue Door|Casa Verde|Little Tokyo|The Rusty Anchor|
Chez Marie|Spice Garden|Old Mill Inn|Bella Napoli|The Hungry Bear|Green Papaya|Royal Tandoor|
La Paloma|The Copper Pot|Sakura House|Noodle Corner|The Salty Dog|Harbour Grill|Taverna Zorba|
Red Lantern|The Lazy Fox|Cafe Lumiere|Pepper Tree|Silver Spoon|El Toro|The Garden Shed|Mango Bay|
Ocean Pearl|Smoke and Oak|Trattoria Roma|Jade Palace|The Wild Goose|Black Olive|Maison Claude|
Burger Barn|Three Sisters|Villa Rosa|The Tin Kitchen|Himalaya Kitchen|Sunset Terrace|Plum Tree|
Don Pablo|The Iron Duck|Saffron Lane|Moonlight Diner|Cedar Grove|Viking Hall|Pasta Fresca|
The Merry Monk|Lotus Pond|Stone Bridge|Piri Piri|The Paper Crane|Kebab Castle|Willow Bistro|
Tiger Lily|Prairie House|The Quiet Whale|Zinc Bar|Bamboo Yard|Fork and Fig|Hotel Astoria|
Crab Shack|The Velvet Room|Ginger Root|Lemon Lounge|Union Brasserie|Nomad Canteen|Olive Branch""",
    "to": """Anna|Ben|Carla|David|Elena|Frank|Grace|Hugo|Ines|Jack|Karen|Liam|Maria|Nadia|Oscar|
Paula|Quentin|Rosa|Samuel|Teresa|Ursula|Victor|Wendy|Xavier|Yara|Zoe|Ahmed|Bruno|Chloe|Diego|Emma|
Farid|Giulia|Hannah|Ivan|Julia|Kenji|Laura|Marco|Nina|Olga|Pedro|Rachel|Stefan|Tomas|Vera|William|
Yusuf|Aisha|Boris|Camille|Dmitri|Esther|Felix|Greta|Henrik|Isabel|Joaquin|Kamal|Lucia|Mateo|Noor|
Otto|Priya|Rafael|Sofia|Thabo|Uma|Viktoria|Walter|Ximena|Yolanda|Zainab|Amara|Bjorn|Cedric|Dalia|
Emil|Fatima|Gustav|Hiroshi|Imani|Jasper|Katya|Leila|Magnus|Natasha|Omar|Petra|Rohan|Selma|Tariq|
my sister|my brother|my boss|my mother|my uncle|the landlord|my cousin|the babysitter|my flatmate|
the coach""",
    "title": """blue river|dancing in the rain|midnight train|golden hour|paper planes|
summer wine|broken arrows|the long road|city of stars|heavy weather|sweet honey|lost and found|
electric sky|fade away|little bird|wild horses run|coffee and smoke|silver moon|northern lights|
home again|run to me|rolling thunder|velvet morning|ten thousand miles|empty streets|
burning bridges|ocean eyes wide|fireflies|stay tonight|gravity falls|the last dance|yellow taxi|
cold november|barefoot|hurricane season|mirrors and glass|sunday driver|wishing well|echoes|
castles made of snow|hummingbird|dear old friend|satellite heart|crooked smile|winter coat|
shadow boxing|lighthouse|dusty roads|telephone line|kaleidoscope|strawberry lane|neon jungle|
whispering pines|marble halls|tidal wave|glass slippers|rusty nails|carousel|pocket full of rain|
the quiet hours|magnolia|copper wires|seven bridges|drifting slowly|orange blossom|avalanche|
porcelain|backwards clock|tumbleweed waltz|sailor song""",
    "artist": """the velvet otters|Mona Reyes|Iron Lanterns|Dusty Miller|the night owls|
Saint Harmony|Leo Fontaine|the paper kings|Cosmic Turtles|Ruby Stone|the broken clocks|Nova Lake|
Johnny Marrow|the wandering trees|Silent Parade|Ella Winters|Arctic Parrots|the lonely robots|
Miles Tanner|Purple Canyon|Sister Moonlight|the rolling hills|Karl Bergman|Tin Soldiers|
Amber Rivers|the last astronauts|Brass Monkeys|Lola Vega|Concrete Garden|the happy ghosts|
Stella Nord|Wild Cactus|Eddie Blaze|the foggy mountains|Crystal Foxes|Otis Brown|Sugar Factory|
the glass animals club|Vera Lindt|Desert Bloom|the marching pandas|Felix Hart|Neon Prophets|
Daisy Cole|the crooked pines|Thunder Valley|Marlon Pike|Plastic Emperors|Ivy Sinclair|
the drowsy bees|Granite Wolves|Yuki Tanaka|Pepper Jones|Kingdom of Salt|the yellow umbrellas|
Zora Finch|Mango Republic|Static Bloom|Hazel Quinn|the polite strangers|Boris and the Bears|
Gypsy Falcon|Odessa Blue|the wooden spoons|Frida Holm""",
    "city": """Paris|London|Berlin|Madrid|Rome|Lisbon|Vienna|Prague|Dublin|Athens|Oslo|Helsinki|
Warsaw|Budapest|Zurich|Brussels|Amsterdam|Copenhagen|Stockholm|Milan|Munich|Hamburg|Lyon|Porto|
Seville|Naples|Boston|Chicago|Denver|Seattle|Miami|Dallas|Houston|Atlanta|Phoenix|Toronto|
Montreal|Vancouver|Tokyo|Osaka|Seoul|Beijing|Shanghai|Delhi|Mumbai|Bangkok|Hanoi|Jakarta|Manila|
Sydney|Melbourne|Auckland|Cairo|Lagos|Nairobi|Cape Town|Casablanca|Lima|Bogota|Santiago|
Buenos Aires|Montevideo|Quito|Havana|New York|Los Angeles|San Diego|Mexico City|Kuala Lumpur|
Ho Chi Minh City|Rio de Janeiro|Marseille|Krakow|Bratislava|Ljubljana|Reykjavik|Tallinn|
Gothenburg|Edinburgh|Glasgow|Liverpool|Antwerp|Valencia|Bilbao|Florence|Palermo|Thessaloniki|
Istanbul|Ankara|Tbilisi|Yerevan|Karachi|Dhaka|Kathmandu|Nagoya|Brisbane|Wellington|Nashville|
Portland|Detroit|Calgary|Medellin""",
    "event": """team lunch|the budget review|dentist appointment|yoga class|parents evening|
job interview|the sales meeting|piano lesson|project kickoff|birthday party|the doctor visit|
book club|coffee with the designers|swimming lesson|weekly planning|the board meeting|
guitar practice|chess club|the house viewing|spanish course|haircut|product demo|the school play|
car inspection|choir rehearsal|company picnic|the eye exam|tennis match|code review|
the parking dispute|pottery workshop|blood test|farewell drinks|the tax consultation|movie night|
physiotherapy|security training|the wedding rehearsal|first aid course|museum tour|
onboarding session|the vet appointment|brainstorming|quarterly results|running group|
client workshop|the bank appointment|science fair|game night|language exchange|photo shoot|
the design sprint|fire drill|family dinner|cooking class|the garden party|press briefing|
boxing lesson|poetry reading|budget forecast|wine tasting|the driving test|orchestra concert|
volunteer shift|hiring panel|salsa class""",
    "text": """i am running late|the meeting is cancelled|dinner is ready|
i left the keys under the mat|the train is delayed|we need more milk|i love the photos|
the package has arrived|i will call later|the party starts early|my phone is broken|i got the job|
the baby is asleep|we are out of coffee|the car is in the garage|i cannot come tonight|
the report looks great|you won the bet|i am waiting outside|the dog is fine|i found your wallet|
the tickets are sold out|the plumber is coming|my flight has landed|i need a ride home|
the wifi is down again|we moved to a bigger room|i fixed the printer|the match is on channel nine|
her surgery went well|i miss you a lot|the rehearsal was awful|the soup needs salt|
grandma says hello|the invoice is wrong|i locked myself out|we have a new neighbour|
the concert was amazing|the lift is out of order|i already ate|the deadline has changed|
your jacket is at my place|the code compiles now|i forgot my umbrella|the pizza is getting cold|
there is no parking here|the boss wants to see you|the kids are at school|i bought the wrong size|
the heating is off|it is snowing here|the contract is signed|traffic is terrible|my laptop died|
the museum is closed|we lost the game|i booked the hotel|his fever is gone|
the cat climbed the curtains|nobody answered the door|the elevator smells odd|our bus broke down|
the gym opens earlier|i passed my exam|the beach was crowded|she liked the flowers|
the projector works fine|the hamster escaped""",
    "label": """pasta|eggs|bread|laundry|pizza|rice|tea|nap|oven|workout|cookies|chicken|
potatoes|soup|meditation|cake|roast|coffee|dishwasher|lasagna|homework|stretching|noodles|break|
face mask|steak|risotto|dough|muffins|sauna|quinoa|hair dye|plank|beans|salmon|pie|sprinkler|
granola|reading|dumplings|broccoli|marinade|curry|ice bath|jelly|parking meter|omelette|waffles|
lentils|game|turkey|piano drill|focaccia|glue|brownies|yoghurt|concrete|bath|paint|custard""",
}

DAYS: Final = (
    "today",
    "tomorrow",
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
)
ROOMS: Final = ("kitchen", "bedroom", "office", "garage", "bathroom", "garden", "hall")
CURRENCIES: Final = {
    "EUR": ("{} euros", "{} EUR", "€{}"),
    "USD": ("{} dollars", "{} USD", "${}"),
    "GBP": ("{} pounds", "{} GBP", "£{}"),
}
# Numbers of the task: a held-out one is in no training call, yet the primer taught its name.
CLOSED_VALUES: Final[dict[str, list[Any]]] = {
    "time": [f"{hour:02d}:{minute:02d}" for hour in range(24) for minute in range(0, 60, 5)],
    "people": list(range(2, 25)),
    "amount": [*range(5, 200), *(x + 0.5 for x in range(5, 100)), *range(200, 1000, 10)],
    "minutes": [*range(2, 100), 120, 180, 240, 300],
}
ATOMIC: Final = {*range(21), *range(30, 100, 10)}  # numbers of one word
HELD_OUT_SHARE: Final = {"valid": 0.08, "test": 0.2}
# Keywords, the same in every split: few, and said in words that have to be known, not copied.
SHARED: Final = {"call", "day", "room", "currency", "people"}
FIELD_KIND: Final = {("create_event", "title"): "event"}  # a field is named after its kind, but for
KINDS: Final = (*OPEN_VALUES, *CLOSED_VALUES)

# --------------------------------------------------------------------------- saying a value

ONES: Final = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS: Final = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def number_word(n: int) -> str:
    """English for 0..99."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")


def say_number(rng: Random, n: int) -> str:
    """Digits, or words."""
    return number_word(n) if rng.random() < 0.5 else str(n)


def say_time(rng: Random, time: str) -> str:
    """One of the ways to say a 24-hour time: 19:30, 7:30 pm, half past 7 in the evening, ..."""
    hour, minute = int(time[:2]), int(time[3:])
    h12, half = (hour + 11) % 12 + 1, "am" if hour < 12 else "pm"
    ways = [time, f"{h12}:{minute:02d} {half}", f"{h12}:{minute:02d} {half}"]
    if minute == 0:
        ways += [f"{h12} {half}", f"{h12} {half}", f"{number_word(h12)} {half}"]
    if minute in (15, 30):
        part = {15: "quarter", 30: "half"}[minute]
        ways += [f"{part} past {h12} {half}", f"{part} past {number_word(h12)} {half}"]
    return rng.choice(ways)


def say_day(rng: Random, day: str, on: bool) -> str:
    """`on friday`, `this Friday`, `tomorrow` where `on`, else the bare day."""
    if day in ("today", "tomorrow"):
        return day
    name = rng.choice((day, day.capitalize()))
    return rng.choice(("on {}", "on {}", "this {}")).format(name) if on else name


def say_minutes(rng: Random, minutes: int) -> str:
    """`45 minutes`, `half an hour`, `two hours`."""
    if minutes == 30 and rng.random() < 0.5:
        return "half an hour"
    if minutes == 60:
        return rng.choice(("an hour", "one hour", "1 hour"))
    if minutes % 60 == 0:
        return f"{say_number(rng, minutes // 60)} hours"
    return f"{say_number(rng, minutes)} minutes"


def say_money(rng: Random, amount: int | float, currency: str) -> str:
    """`20 euros`, `€20`, `twenty dollars`, `12.50 GBP`."""
    forms = CURRENCIES[currency]
    if isinstance(amount, int) and amount < 100 and rng.random() < 0.25:
        return forms[0].format(number_word(amount))
    digits = str(amount) if isinstance(amount, int) else f"{amount:.2f}"
    return rng.choice((forms[0], *forms)).format(digits)


# --------------------------------------------------------------------------- the task: rows


def chat(*turns: tuple[str, str]) -> Row:
    """Turns of (user, assistant) as one row."""
    messages: list[Message] = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"messages": messages}


def open_values(kind: str) -> list[str]:
    return listed(OPEN_VALUES[kind], "|")


def time_split(time: str) -> str:
    """The split that may use a clock time: every hour and every minute is in train, but not every
    pair. Chance would keep an hour's only spoken forms ("eight pm", "half past eight") from it."""
    diagonal = (int(time[:2]) + int(time[3:]) // 5) % 12
    return "valid" if diagonal == 0 else "test" if diagonal in (1, 2) else "train"


def split_values(rng: Random) -> dict[str, Pools]:
    """Each kind's values shuffled and cut into disjoint pools, one per split.

    A text that also stands inside a phrasing, another value or the primer's vocabulary (`bread`)
    cannot be kept from the base or from training, so it goes to train; so does a number that is one
    word (`ten`): those are vocabulary, held out are numbers made of them.
    """
    pools: dict[str, Pools] = {split: {} for split in SPLITS}
    everything = [v for kind in OPEN_VALUES for v in open_values(kind)]
    phrasings = [p for call in CALLS for split in SPLITS for p in call.phrasings(split)]
    vocabulary = [*NOUNS, *ADJECTIVES, *VERBS, *LINKS, *ROOMS, *heads()]
    seen = Counter(v for text in (*phrasings, *vocabulary) for v in HeldOut(everything).all(text))
    seen += Counter(v for text in everything for v in HeldOut(everything).all(text))
    for kind in KINDS:
        values: list[Any] = list(CLOSED_VALUES.get(kind) or open_values(kind))
        if len(set(values)) != len(values):
            raise AssertionError(f"{kind}: a value is listed twice")
        if kind == "time":
            for split in SPLITS:
                pools[split][kind] = [time for time in values if time_split(time) == split]
            continue
        if kind in SHARED:
            pools |= {split: {**pools[split], kind: values} for split in SPLITS}
            continue
        rng.shuffle(values)
        values.sort(
            key=lambda v: v in ATOMIC or (isinstance(v, str) and seen[normal(v)] > 1)
        )  # stable: last
        start = 0
        for split, share in HELD_OUT_SHARE.items():
            stop = start + max(2, round(share * len(values)))
            pools[split][kind] = values[start:stop]
            start = stop
        pools["train"][kind] = values[start:]
    return pools


def fill(
    rng: Random, call: Call, phrasing: str, pools: Pools, invented: float = 0.0
) -> tuple[str, str]:
    """A request by that phrasing with values from `pools`, and the JSON call it stands for.

    `invented`: share of the open values that are made up instead.
    """
    spoken: dict[str, str] = {}
    values: dict[str, Any] = {"call": call.name}
    for field in call.fields:
        kind = FIELD_KIND.get((call.name, field), field)
        if kind == "day":
            values["day"] = rng.choice(DAYS)
            spoken["day"] = say_day(rng, values["day"], on=False)
            spoken["on_day"] = say_day(rng, values["day"], on=True)
        elif kind == "room":
            values["room"] = spoken["room"] = rng.choice(ROOMS)
        elif kind == "currency":
            values["currency"] = rng.choice(sorted(CURRENCIES))
            spoken["money"] = say_money(rng, values["amount"], values["currency"])
        else:
            make_up = invented and kind in INVENT and rng.random() < invented
            value = coined(rng, INVENT[kind](rng)) if make_up else rng.choice(pools[kind])
            values[field] = value
            say = SAY.get(kind)
            spoken[kind] = say(rng, value) if say else str(value)
    return phrasing.format(**spoken), json.dumps(values, ensure_ascii=False)


SAY: Final[dict[str, Callable[[Random, Any], str]]] = {
    "time": say_time,
    "people": say_number,
    "minutes": say_minutes,
}


def task_rows(
    rng: Random, split: str, pools: Pools, count: int, held: HeldOut, names: Sequence[str]
) -> list[Row]:
    """`count` different rows, spread evenly over the named calls and their phrasings of that split.

    Most open values of a training row are made up: a list is learnt by heart, a made-up word can
    only be copied from the request.
    """
    rows: dict[str, Row] = {}
    turn = 0
    invented = INVENTED_SHARE if split == "train" else 0.0
    calls = [call for call in CALLS if call.name in names]
    while len(rows) < count:
        call = calls[turn % len(calls)]
        phrasings = call.phrasings(split)
        phrasing = phrasings[turn // len(calls) % len(phrasings)]
        request, answer = fill(rng, call, phrasing, pools, invented)
        closer = "" if phrasing.endswith(("{task}", "{text}")) else rng.choice(CLOSERS[split])
        request = rng.choice(OPENERS[split]) + request + closer
        if split != "train" or not held.find(request):
            rows.setdefault(request, chat((request, answer)))
            turn += 1
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return ordered


# --------------------------------------------------------------------------- the primer: words

ONSETS: Final = listed(
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk "
    "sl sm sn sp st str sw th tr tw wh x"
)
VOWELS: Final = listed("a e i o u a e i o u a e i o ai au ea ee ie oa oo ou ow y io")
CODAS: Final = listed(
    "b ck d ff g k l ll m mp n nd ng nk nt p r rd rk rm rn rt s sh ss st t th x ght ve ne le te"
)
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"

# Ordinary words, so that the tokenizer and the base know some English.
NOUNS: Final = listed("""lamp chair book river stone horse window basket ladder bottle pencil
blanket mirror bridge wagon candle hammer shovel bucket carpet boat wheel drum flute apple pear
onion carrot cheese butter sugar honey flour grape melon cherry coat hat scarf glove shoe belt
ring watch clock map box bag rope tent stove spoon fork plate bowl cup jar pot pan knife desk
shelf sofa pillow towel soap brush comb broom hose saw nail screw wire pipe tile brick plank log
leaf root seed flower tree bush grass field hill lake island beach forest farm barn fence gate
road path street station market shop school church tower castle museum library office kitchen
cellar roof wall floor door stairs picture letter card ticket coin song story film game ball
kite puzzle robot engine train truck bus tractor rocket helmet radio camera phone screen table
paper folder stamp key lock chain bell whistle trumpet guitar violin piano cat dog rabbit duck
goose goat sheep cow pig mouse owl bear wolf fox deer frog snake turtle spider ant bee fish
whale shark teacher doctor farmer baker driver painter singer sailor nurse guard child friend
neighbour class lesson meeting course party lunch dinner breakfast soup bread rice egg tea milk
cake room house night morning evening week month rain snow wind storm cloud sun moon star garden
plant work visit plan club group team test review report photo list note bill bank car bike
flight hotel trip""")
ADJECTIVES: Final = listed("""red blue green yellow black white brown grey golden silver big
small old new long short wide narrow heavy light warm cold dry wet soft hard sharp round flat
quiet loud fast slow bright dark clean dirty rough smooth sweet sour fresh broken happy sad
tired angry brave shy clever funny strange famous empty full open closed early late wooden
iron paper plastic little great last first lost wild good bad free busy ready right wrong""")
VERBS: Final = listed("""carry paint repair lift push pull throw catch find hide open close cut
fold wash dry bring take keep hold drop build break lend borrow sell draw show pick move turn
fill empty wrap burn count weigh measure clean cook eat drink bake mix share save store collect
choose check test watch follow help meet teach learn read write sing visit leave start stop call
order fix pack feed change plan print return join finish""")
LINKS: Final = listed("""the a my your our his her this that and or with for from to in on at by
of under near behind before after because so but not is was are were has had will can must does
it we they you i he she there here now then again today very too also only more some every no
about into out up down off over back if when where who what how all any than as be been am do
did would could should me us them""")


def made_up(rng: Random) -> str:
    """A pronounceable word that likely nobody has seen, or now and then plain random letters."""
    if rng.random() < 0.12:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))
    syllables = rng.choice((1, 1, 1, 2, 2, 2, 3))
    word = ""
    for _ in range(syllables):
        word += rng.choice(ONSETS) if rng.random() < 0.9 else ""
        word += rng.choice(VOWELS)
        word += rng.choice(CODAS) if rng.random() < 0.45 else ""
    return word


def english(rng: Random) -> str:
    """An English word; rarely one that could as well join two parts of a sentence."""
    drawn = rng.choice(rng.choice((NOUNS, NOUNS, ADJECTIVES, VERBS, LINKS)))
    return drawn if drawn not in MARKERS or rng.random() < 0.2 else rng.choice(NOUNS)


def word(rng: Random) -> str:
    """A made-up word or an English one."""
    return made_up(rng) if rng.random() < 0.5 else english(rng)


def name(rng: Random) -> str:
    """A proper name: one or two made-up words, capitalised, now and then of one initial."""
    first, second = made_up(rng), made_up(rng)
    if rng.random() < 0.25:
        second = first[: rng.randint(1, 2)] + second
    return " ".join(part.capitalize() for part in (first, second)[: rng.choice((1, 1, 1, 2))])


def place_name(rng: Random) -> str:
    first = rng.choice(("The ", "", "", "")) + rng.choice((made_up, english))(rng).capitalize()
    second = rng.choice((name(rng), rng.choice(NOUNS).capitalize()))
    return first + rng.choice(("", "", "'s", f" {second}", f" {second}", f" and {second}"))


def bare_thing(rng: Random) -> str:
    """A noun, often with an adjective."""
    noun = rng.choice(NOUNS) if rng.random() < 0.6 else made_up(rng)
    if rng.random() < 0.6:
        noun = f"{rng.choice(ADJECTIVES) if rng.random() < 0.7 else made_up(rng)} {noun}"
    return noun


def thing(rng: Random) -> str:
    """A noun phrase."""
    return rng.choice(("the ", "a ", "my ", "", "", "")) + bare_thing(rng)


def action(rng: Random) -> str:
    """What one can do: a verb and its object."""
    verb = rng.choice(VERBS) if rng.random() < 0.6 else made_up(rng)
    article = rng.choice(("the", "my", "a", "some", "your"))
    return f"{verb} {article} {rng.choice((bare_thing, word))(rng)}"


def clause(rng: Random) -> str:
    """A short statement."""
    pronoun = rng.choice(listed("i we you she he they it there nobody"))
    a_noun = rng.choice(
        (f"the {word(rng)}", f"my {word(rng)}", f"our {bare_thing(rng)}", word(rng))
    )
    subject = rng.choice((pronoun, pronoun, a_noun, a_noun, name(rng)))
    state = rng.choice(("is", "was", "has", "will be", "needs", "wants", "likes", "saw", "says"))
    act = f"{rng.choice(VERBS)}{rng.choice(('', 's', 'ed'))}"
    return f"{subject} {rng.choice((state, state, act, made_up(rng)))} {words(rng, 1, 4)}"


def words(rng: Random, low: int, high: int) -> str:
    """Words; now and then one comes twice or begins like another: copying must keep its place."""
    drawn = [word(rng) for _ in range(rng.randint(low, high))]
    if len(drawn) > 1 and rng.random() < 0.25:
        i, j = rng.sample(range(len(drawn)), 2)
        drawn[j] = drawn[i] if rng.random() < 0.3 else drawn[i][: rng.randint(1, 3)] + made_up(rng)
    return " ".join(drawn)


INVENTED_SHARE: Final = 0.75
# Shapes of made-up values: n noun, a adjective, v verb, w made-up word, in upper case capitalised.
SHAPES: Final = {
    "place": "W's|The W|The A N|The W N|The A W|W W|W N|N and N|W and N|The N and W|A N|W|La W|"
    "N of W|Chez W",
    "artist": "the a ns|W W|W|The Ns|A Ns|N of W|the w ns|DJ W|A N and W|w",
    "title": "n|a n|w n|n of ns|the a n|v the n|a ns|w w|v me a n|n and n|my a n|n in the n|w of n",
    "event": "the n n|n|a n|w n|n with W|the n|n and n|my n n|w|the a n|n of the n|v the n",
    "label": "n|n|a n|w|n n|n n|w n|w w|v n|a ns|v",
    "city": "W|W|W|W W|San W|New W|W N",
    "to": "W|W|W|W|W W|Dr W|aunt W",
}


def shaped(kind: str) -> Callable[[Random], str]:
    """A generator of values of one of the kind's shapes."""
    letters = {"n": NOUNS, "a": ADJECTIVES, "v": VERBS}
    shapes = SHAPES[kind].split("|")

    def make(rng: Random) -> str:
        def word_for(match: re.Match[str]) -> str:
            letter, plural = match[1], match[2]
            pool = letters.get(letter.lower())
            chosen = rng.choice(pool) if pool and rng.random() < 0.8 else made_up(rng)
            return (chosen.capitalize() if letter.isupper() else chosen) + plural

        return re.sub(r"\b([navwNAVW])(s?)\b", word_for, rng.choice(shapes))

    return make


def coined(rng: Random, value: str) -> str:
    """The value; often with a word in it that begins or ends like an English one, as "package"
    does: no part of a word must decide how the rest of it is copied."""
    parts = value.split()
    if rng.random() < 0.4:
        at = rng.randrange(len(parts))
        one, other = (rng.choice((*NOUNS, *VERBS, *ADJECTIVES)) for _ in range(2))
        new = one + made_up(rng) if rng.random() < 0.4 else one[:4] + other[-rng.randint(2, 4) :]
        parts[at] = new.capitalize() if parts[at][0].isupper() else new
    return " ".join(parts)


INVENT: Final[dict[str, Callable[[Random], str]]] = {  # kind of an open value -> a made-up one
    **{kind: shaped(kind) for kind in SHAPES},
    "task": action,
    "text": clause,
}

# --------------------------------------------------------------------------- the primer: skills

Skill = Callable[[Random, Sequence[str]], list[tuple[str, str]]]  # (rng, clock times) -> turns

REPEAT: Final = ("repeat: {}", "say this: {}", "copy: {}", "repeat after me: {}", "again: {}")
AFTER: Final = ("what comes after {m} in: {t}", "{t}\nwrite what follows {m}", "after {m}? {t}")
BEFORE: Final = (
    "what comes before {m} in: {t}",
    "{t}\nwrite what is before {m}",
    "before {m}? {t}",
)
BETWEEN: Final = (
    "what is between {m} and {n} in: {t}",
    "{t}\nwrite the part from {m} to {n}",
    "between {m} and {n}? {t}",
)
MARKERS: Final = listed("to the in on for by at with that from and is of : , saying called")
EVERYTHING: Final = ("all as JSON: {}", "{}\nall of it as JSON", "JSON: {}", "what is said: {}")
ASK: Final = ("what is the {}?", "the {}?", "tell me the {}", "which {}?", "give the {}")
EXTRACT: Final = (
    "give {k} as JSON: {t}",
    "{t}\nJSON with {k}",
    "extract {k} from: {t}",
    "fill in {k}: {t}",
    "{k} as JSON. {t}",
)

# Facts: a head, then none to three adjuncts of the roles it admits, before or after it.
HEADS: Final = {
    "hour day length room town friend": (
        "{person} has to {job}",
        "{person} wants to {job}",
        "{person} forgot to {job}",
        "ask {person} to {job}",
        "help me to {job}",
        "we plan to {job}",
        "who can {job}",
        "i will {job}",
        "it is time to {job}",
        "try to {job}",
        "{job}",
    ),
    "hour day length house town room": (
        "{lesson} starts",
        "there is {lesson}",
        "we have {lesson}",
        "{person} teaches {lesson}",
        "come to {lesson}",
        "do not miss {lesson}",
        "{lesson} with {person}",
        "{lesson}",
    ),
    "hour day length friend": (
        "{person} drives to {town}",
        "the bus to {town} leaves",
        "fly to {town}",
        "how do i get to {town}",
        "the road to {town} is closed",
        "the shops in {town} are open",
        "{person} lives in {town}",
        "is it nice in {town}",
        "i want to see {town}",
        "show me {town}",
    ),
    "hour day count friend town": (
        "{house} is open",
        "we slept at {house}",
        "{person} works at {house}",
        "is there room at {house}",
        "walk to {house}",
        "i like {house}",
        "{house} has beds",
    ),
    "author room house town day": (
        "read {work}",
        "{work} is a book",
        "{work} hangs",
        "i saw {work}",
        "the film {work} was shown",
        "a picture called {work}",
        "look at {work}",
        "print {work}",
        "copy {work}",
    ),
    "room house town day": (
        "{person} wrote {work}",
        "{person} painted {work}",
        "{person} is the writer of {work}",
        "{person}: {work}",
    ),
    "day town hour": (
        "{item} costs {price}",
        "{person} found {price}",
        "{person} lost {price}",
        "{person} won {price}",
        "{person} sold {item} for {price}",
        "buy {item} from {person} for {price}",
        "the price of {item} is {price}",
        "{price} is what {person} wants",
        "{item} from {person} is {price}",
        "lend {person} {price}",
        "borrow {price} from {person}",
    ),
    "day hour": (
        "{person} said that {words}",
        "{person} thinks that {words}",
        "{friend} heard {person} say {words}",
        "ask {person} if {words}",
        "{person} shouted: {words}",
        "{person} wrote on the wall that {words}",
        "read this to {person}: {words}",
        "the note for {person} was: {words}",
        "{person} asked {friend} if {words}",
    ),
    "day hour length": (
        "bring {item} to {person}",
        "hand {person} {item}",
        "lend {item} to {person}",
        "{person} gave {item} to {friend}",
        "carry {item} to {house}",
        "put {item} in the {room}",
        "{item} is in the {room}",
        "the {room} was full of {item}",
    ),
    "room hour friend": (
        "{item} needs {length}",
        "boil {item} for {length}",
        "leave {item} in the water for {length}",
        "it takes {length} to {job}",
        "{length} is enough for {item}",
        "dry {item} for {length}",
        "after {length} {item} is ready",
        "{length} of {lesson}",
    ),
    "hour day house town": (
        "{count} people came",
        "there were {count} guests",
        "a boat for {count}",
        "{count} of us slept",
        "we were {count}",
        "a room for {count} people is free",
    ),
}
ADJUNCTS: Final = {
    "hour": ("at {hour}", "at {hour}", "at {hour}", "from {hour}", "after {hour}", "{hour}"),
    "day": ("{on_day}", "{on_day}", "{on_day}", "for {day}", "{day}"),
    "length": ("for {length}", "for {length}", "within {length}", "{length} long"),
    "room": ("in the {room}", "in the {room}", "from the {room}"),
    "town": ("in {town}", "in {town}", "near {town}", "from {town}"),
    "house": ("at {house}", "at {house}", "next to {house}"),
    "friend": ("with {friend}", "for {friend}", "and {friend}"),
    "count": ("for {count}", "for {count} people", "with {count} others"),
    "author": ("by {author}", "by {author}", "from {author}"),
}
LAST: Final = "{words}"  # nothing can follow it
ROLES: Final = {  # key -> kind of value, in the order of a full answer
    "person": "name",
    "friend": "name",
    "job": "job",
    "lesson": "thing",
    "item": "thing",
    "work": "title",
    "author": "name",
    "price": "money",
    "count": "number",
    "house": "place",
    "town": "town",
    "room": "room",
    "day": "day",
    "hour": "hour",
    "length": "minutes",
    "words": "words",
}
SLOT: Final = re.compile(r"{(\w+)}")


def say_kind(rng: Random, kind: str, times: Sequence[str], on: bool = False) -> Spoken:
    """A value of that kind as it is said, and its JSON value: the primer's conventions."""
    if kind == "hour":
        time = rng.choice(times)
        return say_time(rng, time), time
    if kind == "day":
        day = rng.choice(DAYS)
        return say_day(rng, day, on), day
    if kind == "number":
        n = rng.choice((rng.randint(1, 25), rng.randint(1, 99)))
        return say_number(rng, n), n
    if kind == "minutes":
        minutes = rng.choice((rng.randint(2, 99), rng.choice((30, 60, 120, 180, 240, 300, 360))))
        return say_minutes(rng, minutes), minutes
    if kind == "money":
        amount = rng.choice((rng.randint(1, 99), rng.randint(1, 999), rng.randint(1, 99) + 0.5))
        currency = rng.choice(sorted(CURRENCIES))
        return say_money(rng, amount, currency), {"amount": amount, "currency": currency}
    if kind == "room":
        room = rng.choice((*ROOMS, "cellar", "attic", "library", made_up(rng)))
        return room, room
    text = FREE[kind](rng)
    return text, text


FREE: Final[dict[str, Callable[[Random], str]]] = {
    "name": lambda rng: name(rng) if rng.random() < 0.8 else f"my {rng.choice(NOUNS)}",
    "town": name,
    "place": place_name,
    "thing": thing,
    "title": lambda rng: words(rng, 1, 4),
    "job": action,
    "words": lambda rng: clause(rng) if rng.random() < 0.7 else words(rng, 2, 7),
}


def heads() -> list[str]:
    return [head for some in HEADS.values() for head in some]


def shape(rng: Random) -> str:
    """A sentence with its values left open."""
    roles = rng.choice(tuple(HEADS))
    head = rng.choice(HEADS[roles])
    free = [role for role in listed(roles) if role not in SLOT.findall(head)]
    front: list[str] = []
    back: list[str] = []
    for role in rng.sample(free, min(len(free), rng.choice((0, 1, 1, 2, 2, 3)))):
        adjunct = rng.choice(ADJUNCTS[role])
        (front if head.endswith(LAST) or rng.random() < 0.25 else back).append(adjunct)
    start, end = " ".join(front), rng.choice((" ", " ", " ", ", ")).join([head, *back])
    return start + (rng.choice((" ", ", ")) if front else "") + end


def fact(rng: Random, sentence: str, times: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A sentence filled in and what it says, key by key; money gives two keys."""
    spoken: dict[str, str] = {}
    values: dict[str, Any] = {}
    slots = {slot.removeprefix("on_"): slot for slot in SLOT.findall(sentence)}
    for key in sorted(slots, key=list(ROLES).index):
        slot = slots[key]
        spoken[slot], value = say_kind(rng, ROLES[key], times, on=slot != key)
        values.update(value if isinstance(value, dict) else {key: value})
    return sentence.format(**spoken), values


def repeat(rng: Random, _: Sequence[str]) -> list[tuple[str, str]]:
    text = words(rng, 1, 10)
    return [(rng.choice(REPEAT).format(text), text)]


def repeat_often(rng: Random, _: Sequence[str]) -> list[tuple[str, str]]:
    text = words(rng, 1, 3)
    n = rng.randint(2, 4)
    return [(f"say {say_number(rng, n)} times: {text}", ", ".join([text] * n))]


def part(rng: Random, _: Sequence[str]) -> list[tuple[str, str]]:
    """What comes before, after or between markers: where does a span begin and end?"""
    left, middle, right = (words(rng, 1, 4) for _ in range(3))
    m, n = rng.sample(MARKERS, 2) if rng.random() < 0.8 else (made_up(rng), made_up(rng))
    used = f"{left} {middle} {right}".split()
    if m in used or n in used or m == n:
        return part(rng, _)
    text = f"{left} {m} {middle} {n} {right}"
    form, answer = rng.choice(
        ((AFTER, f"{middle} {n} {right}"), (BEFORE, left), (BETWEEN, middle), (BETWEEN, middle))
    )
    return [(rng.choice(form).format(m=m, n=n, t=text), answer)]


def pick(rng: Random, _: Sequence[str]) -> list[tuple[str, str]]:
    """First, last, longest word and the like."""
    ws = words(rng, 3, 7).split()
    i = rng.randrange(len(ws) - 1)
    asks = (
        ("first word: {}", ws[0]),
        ("last word: {}", ws[-1]),
        (f"the word after {ws[i]}: {{}}", ws[i + 1]),
        ("all but the first word: {}", " ".join(ws[1:])),
        ("all but the last word: {}", " ".join(ws[:-1])),
        ("as a JSON list: {}", json.dumps(ws)),
    )
    if len(set(ws)) != len(ws):
        return pick(rng, _)
    ask, answer = rng.choice(asks)
    return [(ask.format(" ".join(ws)), answer)]


def convert(rng: Random, times: Sequence[str]) -> list[tuple[str, str]]:
    """Clock times, number words, money and durations into their plain form."""
    kind = rng.choice(("hour", "hour", "number", "minutes", "money", "day"))
    spoken, value = say_kind(rng, kind, times, on=True)
    ask = {
        "hour": ("{} on a 24 hour clock", "24 hours: {}", "time: {}"),
        "number": ("{} in digits", "number: {}", "as a number: {}"),
        "minutes": ("{} in minutes", "how many minutes are {}"),
        "money": ("amount and currency: {}", "{} as JSON"),
        "day": ("which day: {}", "the day in {}"),
    }[kind]
    answer = value if isinstance(value, str) else json.dumps(value)
    return [(rng.choice(ask).format(spoken), answer)]


def question(rng: Random, times: Sequence[str]) -> list[tuple[str, str]]:
    """One to three questions about a fact."""
    text, values = fact(rng, shape(rng), times)
    keys = rng.sample(sorted(values), min(len(values), rng.randint(1, 3)))
    turns = [(rng.choice(ASK).format(key), str(values[key])) for key in keys]
    return [(f"{text}\n{turns[0][0]}", turns[0][1]), *turns[1:]]


def list_keys(keys: Sequence[str]) -> str:
    return " and ".join((", ".join(keys[:-1]), keys[-1])) if len(keys) > 1 else keys[0]


def extract(rng: Random, times: Sequence[str]) -> list[tuple[str, str]]:
    """The keys asked for, in the order asked, or all there are; then the same of other facts."""
    turns = []
    sentence = shape(rng)
    for _ in range(rng.choice((1, 1, 1, 2))):
        text, values = fact(rng, sentence, times)
        if rng.random() < 0.5:
            turns.append((rng.choice(EVERYTHING).format(text), dump(values, list(values))))
        else:
            keys = rng.sample(sorted(values), rng.randint(1, len(values)))
            ask = rng.choice(EXTRACT).format(k=list_keys(keys), t=text)
            turns.append((ask, dump(values, keys)))
    return turns


def dump(values: dict[str, Any], keys: Sequence[str]) -> str:
    return json.dumps({key: values[key] for key in keys}, ensure_ascii=False)


def table(rng: Random, times: Sequence[str]) -> list[tuple[str, str]]:
    """`key value` pairs as JSON."""
    kinds = [rng.choice(sorted({*ROLES.values()} - {"money"})) for _ in range(rng.randint(2, 4))]
    keys = [made_up(rng) if rng.random() < 0.5 else rng.choice(NOUNS) for _ in kinds]
    pairs = [say_kind(rng, kind, times) for kind in kinds]
    joint, end = rng.choice(((": ", "; "), (" is ", ", "), (" = ", "\n"), (" - ", "; ")))
    said = end.join(f"{key}{joint}{spoken}" for key, (spoken, _) in zip(keys, pairs, strict=True))
    values = {key: value for key, (_, value) in zip(keys, pairs, strict=True)}
    return [(f"as JSON: {said}", json.dumps(values, ensure_ascii=False))]


def finish(rng: Random, times: Sequence[str]) -> list[tuple[str, str]]:
    """Finish a sentence that was said before."""
    text = clause(rng) if rng.random() < 0.5 else fact(rng, shape(rng), times)[0]
    ws = text.split()
    cut = rng.randint(1, len(ws) - 1) if len(ws) > 1 else 1
    return [(f"{text}\nfinish: {' '.join(ws[:cut])}", " ".join(ws[cut:]) or ".")]


SKILLS: Final[dict[Skill, int]] = {  # and their weights
    extract: 12,
    convert: 6,
    part: 3,
    question: 2,
    repeat: 3,
    pick: 1,
    table: 1,
    finish: 1,
    repeat_often: 1,
}


COPYING_FIRST: Final = 0.15  # of the rows only repeat: the rest is learnt once copying works
MAX_CHARACTERS: Final = 500  # of a conversation: short ones make quick steps


def primer_rows(rng: Random, times: Sequence[str], count: int, held: HeldOut) -> Iterator[Row]:
    """`count` conversations of one to three skills each; held-out values make it try again."""
    skills, weights = list(SKILLS), list(SKILLS.values())
    start = count - round(COPYING_FIRST * count)
    while count:
        turns: list[tuple[str, str]] = []
        mixed = rng.choices(skills, weights, k=rng.choice((1, 1, 1, 2)))
        for skill in mixed if count <= start else [repeat]:
            turns += skill(rng, times)
        if sum(len(text) for turn in turns for text in turn) > MAX_CHARACTERS:
            continue
        if any(held.find(text) or CALLED.search(text) for turn in turns for text in turn):
            continue
        count -= 1
        yield chat(*turns)


# --------------------------------------------------------------------------- checks


CALLED: Final = re.compile("|".join(call.name for call in CALLS) + '|"call":')


class HeldOut:
    """Finds held-out text values in a text, word by word, whatever the case."""

    WORD: Final = re.compile(r"\w+")

    def __init__(self, values: Iterable[str]) -> None:
        self._by_first: dict[str, list[list[str]]] = {}
        for value in values:
            ws = self.WORD.findall(value.lower())
            self._by_first.setdefault(ws[0], []).append(ws)

    def all(self, text: str) -> Iterator[str]:
        ws = self.WORD.findall(text.lower())
        for i, first in enumerate(ws):
            for value in self._by_first.get(first, ()):
                if ws[i : i + len(value)] == value:
                    yield " ".join(value)

    def find(self, text: str) -> str | None:
        return next(self.all(text), None)


def normal(text: str) -> str:
    """The words of a text as `HeldOut` names them."""
    return " ".join(HeldOut.WORD.findall(text.lower()))


def texts(rows: Iterable[Row]) -> Iterator[str]:
    return (message["content"] for row in rows for message in row["messages"])


def field_values(rows: Iterable[Row]) -> set[tuple[str, Any]]:
    """Every (kind, value) the calls of those rows carry, shared keywords left out."""
    found = set()
    for row in rows:
        call = json.loads(row["messages"][-1]["content"])
        for field, value in call.items():
            if field not in SHARED:
                found.add((FIELD_KIND.get((call["call"], field), field), value))
    return found


def check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def check_disjoint(rows: dict[str, list[Row]], pools: dict[str, Pools]) -> None:
    """No two splits share a phrasing or a value, and no held-out text hides in a training row."""
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        said = {p for call in CALLS for p in call.phrasings(one)}
        shared = said & {p for call in CALLS for p in call.phrasings(other)}
        check(not shared, f"{one} and {other} share phrasings: {shared}")
        common = field_values(rows[one]) & field_values(rows[other])
        check(not common, f"{one} and {other} share values: {common}")
    held = HeldOut(held_out_texts(pools))
    for text in texts(rows["train"]):
        check(held.find(text) is None, f"train holds {held.find(text)!r}: {text}")


def check_primer(rows: Iterable[Row], pools: dict[str, Pools]) -> None:
    """The primer knows no call, no phrasing of the task, no held-out text value or clock time."""
    held = HeldOut(held_out_texts(pools))
    times = {time for split in ("valid", "test") for time in pools[split]["time"]}
    for text in texts(rows):
        check(not CALLED.search(text), f"primer names a call: {text}")
        check(held.find(text) is None, f"primer holds {held.find(text)!r}: {text}")
    for row in rows:
        for message in row["messages"][1::2]:  # as said, 10:20 pm is another time than 10:20
            found = re.findall(r"\b\d\d:\d\d\b(?! [ap]m)", message["content"])
            check(not times.intersection(found), f"primer holds {found}: {message}")
    shapes = set(heads()) | {form for forms in (REPEAT, EXTRACT, ASK) for form in forms}
    check(
        not shapes & {p for c in CALLS for s in SPLITS for p in c.phrasings(s)}, "shared phrasing"
    )


def held_out_texts(pools: dict[str, Pools]) -> list[str]:
    return [v for split in ("valid", "test") for kind in OPEN_VALUES for v in pools[split][kind]]


# --------------------------------------------------------------------------- the model's files

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Words, single digits, runs of punctuation (such as `": "`) and single blanks: a word is cut the
# same way wherever it stands, so copying it is copying its tokens.
PIECES: Final = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*|\s"
ARCHITECTURE: Final[dict[str, Any]] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,  # the usual 0.02 is for wider models: copying comes much later
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_model(out: Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on `corpus`; write it and the model's configuration."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the import: one order of counting
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=specials[0], eos_token=specials[2], model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    config = LlamaConfig.from_dict(
        {"vocab_size": vocab_size, "dtype": "bfloat16", **ids, **ARCHITECTURE}
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    GenerationConfig(**ids).save_pretrained(out)


def store_weights(trained: Path, out: Path) -> None:
    """Puts the weights of a trained base beside its configuration, in bf16 (half the size)."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(trained / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    target = out / "model" / "model.safetensors"
    save_file(halved, target, metadata={"format": "pt"})
    target.chmod(0o644)
    print(f"{target}: {sum(tensor.numel() for tensor in halved.values()):,} parameters")


# --------------------------------------------------------------------------- command line


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("nano"))
    parser.add_argument("--primer", type=Path, default=Path("outputs/nano_primer/primer.jsonl"))
    parser.add_argument("--weights", type=Path, help="only store the base trained in this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=12_000, help="rows")
    parser.add_argument(
        "--calls", nargs="+", default=TAUGHT, choices=[call.name for call in CALLS], metavar="CALL"
    )
    parser.add_argument("--valid", type=int, default=200, help="rows")
    parser.add_argument("--test", type=int, default=400, help="rows")
    parser.add_argument("--primer-rows", type=int, default=144_000)
    parser.add_argument("--vocab", type=int, default=1024)
    args = parser.parse_args()
    if args.weights:
        return store_weights(args.weights, args.out)

    pools = split_values(Random(args.seed))
    held = HeldOut(held_out_texts(pools))
    rows = {
        split: task_rows(
            Random(f"{args.seed} {split}"),
            split,
            pools[split],
            getattr(args, split),
            held,
            args.calls,
        )
        for split in SPLITS
    }
    check_disjoint(rows, pools)
    held_out = {t for split in ("valid", "test") for t in pools[split]["time"]}
    times = [f"{h:02d}:{m:02d}" for h in range(24) for m in range(60)]
    times = [time for time in times if time not in held_out] + pools["train"]["time"] * 4
    rng = Random(f"{args.seed} primer")
    primer = list(primer_rows(rng, times, args.primer_rows, held))
    check_primer(primer, pools)

    for split, some in rows.items():
        write_rows(args.out / f"{split}.jsonl", some)
    write_rows(args.primer, primer)
    mixed = primer[-20_000:]  # the first rows only repeat
    write_model(args.out / "model", texts(mixed), args.vocab)
    print(f"{args.out}: {', '.join(f'{len(r)} {s}' for s, r in rows.items())}", end="; ")
    print(f"{args.primer}: {len(primer)} rows")


if __name__ == "__main__":
    main()
