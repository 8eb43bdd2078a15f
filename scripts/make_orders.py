#!/usr/bin/env python3
"""Makes examples/orders.jsonl and examples/shop.json: 2,000 orders as a shop gets them, and what the shop has to sell.

The same files come out each time; `--check` only compares. Most orders go through. The others are refused at these
stages, after which so many stages have to be undone:

| cause              | orders | refused by        | undone before the order ends            |
| ------------------ | ------ | ----------------- | --------------------------------------- |
| unknown customer   | 3 %    | validate          | 0: failed                               |
| article not listed | 1 %    | price             | 0: failed                               |
| out of stock       | ~5 %   | reserve-inventory | 0: failed                               |
| card declined      | 5 %    | pay               | 1: reservation                          |
| address refused    | 3 %    | ship              | 2: charge, reservation                  |
| account held       | 1 %    | confirm           | 3: parcel, charge, reservation          |

Who is out of stock is not written here: some articles are short, and it depends on whose order comes first, and on
pieces that come back from orders that fail later. An order can have two causes; the earlier stage names it.
`--explain` prints an order of each kind.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SEED = 20240917
ORDERS = 2000
CUSTOMERS = 640
OPENING = datetime(2024, 9, 16, 6, 30, tzinfo=UTC)

COFFEES = {
    "ETH-YIR": ("Ethiopia Yirgacheffe", 990),
    "COL-HUI": ("Colombia Huila", 890),
    "BRA-CER": ("Brazil Cerrado", 790),
    "GUA-ANT": ("Guatemala Antigua", 940),
    "KEN-NYE": ("Kenya Nyeri AA", 1250),
    "SUM-MAN": ("Sumatra Mandheling", 920),
    "ESP-CLA": ("Espresso Classico", 750),
    "DEC-HUI": ("Colombia Huila decaffeinated", 980),
}
TEAS = {
    "DAR-FF": ("Darjeeling First Flush", 1390),
    "ASS-BRO": ("Assam Broken", 690),
    "SEN-UJI": ("Sencha Uji", 1190),
    "EAR-GRE": ("Earl Grey", 720),
    "ROO-VAN": ("Rooibos Vanilla", 590),
    "PEP-MIN": ("Peppermint", 490),
}
EQUIPMENT = {
    "EQ-V60-02": ("Dripper, ceramic, size 02", 2490),
    "EQ-FIL-100": ("Filter papers, 100 pieces", 550),
    "EQ-AER-01": ("Pressure brewer with filters", 3490),
    "EQ-FRP-1L": ("French press, 1 l", 3990),
    "EQ-MOK-03": ("Moka pot, 3 cups", 2790),
    "EQ-MOK-06": ("Moka pot, 6 cups", 3690),
    "EQ-GRI-HD": ("Hand grinder, steel burrs", 8990),
    "EQ-SCA-01": ("Coffee scale, 0.1 g", 5490),
    "EQ-JUG-60": ("Milk jug, 0.6 l", 1890),
    "EQ-CLN-25": ("Cleaning tablets, 25 pieces", 1290),
    "EQ-TEA-12": ("Teapot, cast iron, 1.2 l", 6490),
    "EQ-MUG-SET": ("Mugs, set of four", 3290),
}
# Articles that run out on the way: price, and pieces in stock.
SHORT = {
    "LOT-GEI-19": ("Panama Geisha, lot 19, 100 g", 4900, 34),
    "EQ-KET-GN": ("Gooseneck kettle, 0.9 l", 11900, 41),
    "GIFT-BOX-L": ("Gift box, large", 5900, 47),
    "EQ-CHE-06": ("Pour-over carafe, 6 cups", 5290, 38),
}
DELISTED = ["EQ-V60-01", "ROO-CAR-100", "MON-MAL-1000"]

FIRST_NAMES = (
    "Anna Lukas Marie Jonas Sophie Paul Emma Felix Lena Max Clara Moritz Ida Emil Frieda Anton Greta Oskar Mila Jakob"
    " Charlotte Theo Helene David Johanna Simon Laura Julian Katharina Tim Mehmet Aylin Giulia Marco Agnieszka Piotr"
    " Camille Julien Sanne Daan Ingrid Lars Noor Yusuf Zeynep Matteo Elif Ondrej Chiara Bram"
).split()
LAST_NAMES = (
    "Müller Schmidt Schneider Fischer Weber Meyer Wagner Becker Schulz Hoffmann Koch Richter Klein Wolf Schröder"
    " Neumann Schwarz Zimmermann Braun Krüger Hofmann Hartmann Lange Werner Krause Lehmann Maier Köhler Huber Mayr"
    " Gruber Steiner Yılmaz Kaya Rossi Bianchi Kowalska Nowak Dubois Laurent Jansen Bakker Olsen Novák Ferrari Moser"
).split()
ASCII = str.maketrans("üöäıá", "uoaia")
STREETS = (
    "Hauptstraße Bahnhofstraße Gartenweg Schillerstraße Goethestraße Lindenallee Kirchgasse Mühlenweg Bergstraße"
    " Rosenweg Ringstraße Marktplatz Uferstraße Birkenweg Parkstraße Mozartstraße Feldweg Waldstraße Am_Anger"
    " Brunnengasse"
).split()
CITIES = [
    ("10115", "Berlin", "DE"),
    ("20354", "Hamburg", "DE"),
    ("80331", "München", "DE"),
    ("50667", "Köln", "DE"),
    ("60311", "Frankfurt am Main", "DE"),
    ("70173", "Stuttgart", "DE"),
    ("04109", "Leipzig", "DE"),
    ("01067", "Dresden", "DE"),
    ("28195", "Bremen", "DE"),
    ("90402", "Nürnberg", "DE"),
    ("24937", "Flensburg", "DE"),
    ("79098", "Freiburg im Breisgau", "DE"),
    ("1010", "Wien", "AT"),
    ("8010", "Graz", "AT"),
    ("5020", "Salzburg", "AT"),
    ("6020", "Innsbruck", "AT"),
    ("1012", "Amsterdam", "NL"),
    ("3511", "Utrecht", "NL"),
    ("67000", "Strasbourg", "FR"),
    ("8001", "Zürich", "CH"),
]
UNSERVED = [("27498", "Helgoland", "DE"), ("78266", "Büsingen am Hochrhein", "DE"), ("25849", "Pellworm", "DE")]
DECLINES = ["insufficient funds", "card expired", "reported stolen", "limit exceeded", "refused by the bank"]
NOTES = [
    "Please leave it with the neighbours.",
    "Bitte nicht klingeln, das Baby schläft.",
    "Second floor, the bell is broken.",
    "It is a present, no invoice in the parcel please.",
    "Ring twice; the dog is friendly.",
    "Abstellen in der Garage ist in Ordnung.",
]
CAUSES = {
    "unknown customer": 0.03,
    "article not listed": 0.01,
    "card declined": 0.05,
    "address refused": 0.03,
    "account held": 0.01,
}


@dataclass
class Customer:
    """A customer, where they live, and their card."""

    customer_id: str
    name: str
    email: str
    held: bool
    address: dict[str, str]
    card: str
    declined_for: str | None


def products() -> list[dict[str, Any]]:
    """The price list with the stock of the first day; prices in cents."""
    listed: list[dict[str, Any]] = []
    for sku, (name, cents) in COFFEES.items():
        listed.append({"sku": f"{sku}-250", "name": f"{name}, 250 g", "price": cents, "stock": 1200})
        listed.append({"sku": f"{sku}-1000", "name": f"{name}, 1 kg", "price": cents * 7 // 2, "stock": 600})
    for sku, (name, cents) in TEAS.items():
        listed.append({"sku": f"{sku}-100", "name": f"{name}, 100 g", "price": cents, "stock": 900})
        listed.append({"sku": f"{sku}-250", "name": f"{name}, 250 g", "price": cents * 9 // 4, "stock": 500})
    listed += [{"sku": sku, "name": name, "price": cents, "stock": 700} for sku, (name, cents) in EQUIPMENT.items()]
    listed += [{"sku": sku, "name": name, "price": cents, "stock": left} for sku, (name, cents, left) in SHORT.items()]
    return listed


def make_address(rng: random.Random, name: str) -> dict[str, str]:
    postcode, city, country = rng.choice(CITIES)
    street = f"{rng.choice(STREETS).replace('_', ' ')} {rng.randint(1, 140)}"
    return {"name": name, "street": street, "postcode": postcode, "city": city, "country": country}


def refused_address(rng: random.Random, name: str) -> dict[str, str]:
    """An address that the carrier does not deliver to: a PO box, or a place it has no route to."""
    address = make_address(rng, name)
    if rng.random() < 0.5:
        address["street"] = f"Postfach {rng.randint(1000, 9999)}"
    else:
        address["postcode"], address["city"], address["country"] = rng.choice(UNSERVED)
    return address


def make_customers(rng: random.Random) -> list[Customer]:
    customers = []
    for number in range(CUSTOMERS):
        first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
        name = f"{first} {last}"
        mailbox = f"{first}.{last}".lower().translate(ASCII)
        customers.append(
            Customer(
                customer_id=f"C-{10_000 + number * 7 + rng.randint(0, 6)}",
                name=name,
                email=f"{mailbox}{rng.randint(1, 99)}@example.{rng.choice(['org', 'net', 'com'])}",
                held=number % 40 == 12,
                address=make_address(rng, name),
                card=f"tok_{rng.choice(['visa', 'mc', 'amex', 'giro'])}_{rng.getrandbits(48):012x}",
                declined_for=rng.choice(DECLINES) if number % 16 == 5 else None,
            )
        )
    return customers


def make_items(rng: random.Random, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One to six articles; what is short is wanted by one order in eight."""
    plenty = [product["sku"] for product in listed if product["sku"] not in SHORT]
    count = rng.choices([1, 2, 3, 4, 5, 6], weights=[30, 27, 20, 12, 7, 4])[0]
    skus = rng.sample(plenty, count)
    if rng.random() < 0.145:
        skus[rng.randrange(count)] = rng.choice(list(SHORT))
    return [
        {"sku": sku, "quantity": 1 if sku in SHORT else rng.choices([1, 2, 3, 4, 6], [60, 24, 9, 5, 2])[0]}
        for sku in skus
    ]


def make_orders(
    rng: random.Random, customers: list[Customer], listed: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The orders, and the planted cause of those that have one, by order id."""
    held = [customer for customer in customers if customer.held]
    bad_cards = [customer for customer in customers if customer.declined_for and not customer.held]
    good = [customer for customer in customers if not customer.held and not customer.declined_for]
    plan = [cause for cause, share in CAUSES.items() for _ in range(round(share * ORDERS))]
    plan += [""] * (ORDERS - len(plan))
    rng.shuffle(plan)

    orders, causes, placed_at = [], {}, OPENING
    for number, cause in enumerate(plan):
        placed_at += timedelta(seconds=rng.randint(2, 75))
        customer = rng.choice({"card declined": bad_cards, "account held": held}.get(cause, good))
        address = customer.address
        if cause == "address refused":
            address = refused_address(rng, customer.name)
        elif rng.random() < 0.12:  # a present: sent to somebody else
            address = make_address(rng, f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}")
        items = make_items(rng, listed)
        if cause == "article not listed":
            items[rng.randrange(len(items))]["sku"] = rng.choice(DELISTED)
        order = {
            "order_id": f"ORD-{240_900_000 + number * 3 + rng.randint(0, 2)}",
            "placed_at": placed_at.isoformat().replace("+00:00", "Z"),
            "customer_id": f"C-{rng.randint(90_000, 99_999)}" if cause == "unknown customer" else customer.customer_id,
            "items": items,
            "address": address,
            "card": customer.card,
        }
        if rng.random() < 0.08:
            order["note"] = rng.choice(NOTES)
        orders.append(order)
        if cause:
            causes[str(order["order_id"])] = cause
    return orders, causes


def make_files() -> tuple[dict[Path, str], dict[str, str]]:
    """The text of each file, and the planted causes by order id."""
    rng = random.Random(SEED)
    listed, customers = products(), make_customers(rng)
    orders, causes = make_orders(rng, customers, listed)
    people = [asdict(customer) for customer in customers]
    shop = {
        "products": listed,
        "customers": [{key: person[key] for key in ("customer_id", "name", "email", "held")} for person in people],
        "cards": [
            {"token": person["card"], "customer_id": person["customer_id"], "declined_for": person["declined_for"]}
            for person in people
        ],
    }
    tables = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
        for name, rows in shop.items()
    )
    return {
        EXAMPLES / "orders.jsonl": "".join(json.dumps(order, ensure_ascii=False) + "\n" for order in orders),
        EXAMPLES / "shop.json": "{\n" + tables + "\n}\n",
    }, causes


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the example's orders and shop; the same ones each time.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what is made here")
    parser.add_argument("--explain", action="store_true", help="print one order for each planted cause of a failure")
    options = parser.parse_args()
    files, causes = make_files()
    if options.explain:
        for cause in CAUSES:
            ids = [order for order, its_cause in causes.items() if its_cause == cause]
            print(f"{cause:<20} {len(ids):>4} orders, such as {ids[0]}")
        return 0
    if options.check:
        differing = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
        for path in differing:
            print(f"{path} is not what this script makes: run it without --check", file=sys.stderr)
        return 1 if differing else 0
    for path, text in files.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
