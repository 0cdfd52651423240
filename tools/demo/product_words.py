"""The words products are made of: sixteen families of things, each with what can sensibly be said about it.

A family keeps together what belongs together, so that a kettle may have a whistling lid and a raincoat may not. Every
value is written so that it fits wherever its attribute is used, whatever the voice:

    kind       a singular noun that can be counted; + marks the
               large and - the small ones of a family           "kettle", "stockpot+", "milk pan-"
    material   reads before a noun and after "made of"          "cast iron"
    feature    a noun phrase, after "has" or "with"             "a whistling lid"
    use        a noun phrase, after "for"                       "slow Sunday mornings"
    care       an order, after "please" or "you should"         "wash by hand"
    size       after "is"                                       "30 cm tall"

Words in one list are separated by bars; the order of the lists decides what a seed generates, so append, never sort.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Things of one sort, and the values their attributes may take, ranges from the smallest to the largest thing."""

    kinds: tuple[str, ...]
    materials: tuple[str, ...]
    features: tuple[str, ...]
    uses: tuple[str, ...]
    cares: tuple[str, ...]
    directions: tuple[str, ...]
    centimetres: tuple[int, int]
    grams: tuple[int, int]
    dollars: tuple[int, int]


def _list(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split("|"))


def _family(
    kinds: str,
    materials: str,
    features: str,
    uses: str,
    cares: str,
    directions: str,
    centimetres: tuple[int, int],
    grams: tuple[int, int],
    dollars: tuple[int, int],
) -> Family:
    return Family(
        _list(kinds),
        _list(materials),
        _list(features),
        _list(uses),
        _list(cares),
        _list(directions),
        centimetres,
        grams,
        dollars,
    )


FAMILIES: tuple[Family, ...] = (
    _family(  # cookware
        "kettle|saucepan|soup pot|casserole dish|frying pan|stockpot+|milk pan-|teapot|roasting tin+|wok+|coffee pot|"
        "griddle|steamer|fondue pot|sauce boat-",
        "cast iron|copper|stainless steel|enamelled steel|aluminium|stoneware|hammered copper|brushed steel",
        "a heavy lid|a cool-touch handle|a drip-free spout|two riveted handles|a wide pouring lip|an even base|"
        "a wooden knob|a tight-fitting lid|a non-stick coating|marks for measuring|a hanging ring|a thick bottom|"
        "an insulated grip",
        "slow Sunday mornings|family dinners|winter soups|quick suppers|small kitchens|cooking over gas|"
        "large gatherings|first flats|open-fire cooking|weeknight meals|keen cooks|long, gentle simmering",
        "wash by hand|dry it at once after washing|rub it with a little oil|keep it away from steel wool|"
        "let it cool before washing|wipe it with a damp cloth|heat it slowly",
        "cm wide|cm across|cm tall",
        (14, 38),
        (600, 4800),
        (18, 160),
    ),
    _family(  # tableware
        "mug|dinner plate|serving bowl+|cake stand|milk jug|sugar bowl-|butter dish-|egg cup-|fruit bowl|"
        "pitcher|platter+|"
        "salad bowl+|teacup-|goblet|gravy jug|soup bowl",
        "stoneware|bone china|porcelain|olive wood|recycled glass|pewter|terracotta|glazed clay|acacia wood",
        "a wide rim|a hand-painted border|a speckled glaze|a small foot|a smooth handle|a fluted edge|a gold rim|"
        "a matching saucer|a fitted lid|a thumbprint pattern|softly curved sides|a raised leaf pattern|"
        "a chip-resistant edge",
        "garden parties|afternoon tea|birthday breakfasts|everyday meals|festive tables|picnics by the lake|"
        "long lunches|wedding gifts|sharing with friends|quiet breakfasts|holiday feasts|Sunday roasts",
        "wash by hand|use the gentle cycle|keep it out of the microwave|stack it with a cloth between|"
        "wipe it with a damp cloth|avoid sudden heat",
        "cm across|cm wide|cm tall",
        (8, 34),
        (150, 1400),
        (6, 85),
    ),
    _family(  # kitchen tools
        "cutting board|rolling pin|salt mill-|pepper mill-|coffee grinder|bread bin+|spice rack|colander|cheese grater|"
        "mortar|kitchen scale|ladle|whisk-|serving tray|knife block+|mixing bowl|cookie jar|pastry brush-",
        "beech|bamboo|walnut|stainless steel|marble|oak|maple|brushed aluminium|cherry wood",
        "a non-slip base|rounded edges|a hanging loop|a juice groove|a ceramic core|rubber feet|a leather strap|"
        "a snug lid|an easy-grip handle|a magnetic catch|a removable tray|clear markings|a steel pin",
        "Sunday baking|busy kitchens|first-time bakers|fresh bread|herb gardens and big pots|small worktops|"
        "weekend brunches|cooking with children|neat cupboards|daily chopping and mixing|rainy-day baking",
        "oil it twice a year|wash by hand|wipe it dry after use|keep it out of the dishwasher|brush out the crumbs|"
        "store it in a dry place",
        "cm long|cm wide",
        (10, 48),
        (120, 2600),
        (8, 95),
    ),
    _family(  # seating
        "armchair|stool-|bench+|rocking chair|dining chair|footstool-|sofa+|deckchair|bar stool|"
        "chaise longue+|window seat+|"
        "desk chair|reading chair|folding chair|love seat+",
        "oak|ash|beech|walnut|rattan|bent plywood|powder-coated steel|reclaimed pine|teak|tubular steel",
        "a woven seat|wide armrests|a high back|a removable cushion|tapered legs|brass feet|a curved backrest|"
        "hidden storage|a deep seat|a padded headrest|felt pads under the legs|a footrest|a tilting back",
        "long evenings with a book|small balconies|busy family kitchens|quiet corners|afternoon naps|home offices|"
        "sunny porches|tall tables|narrow hallways|winter nights by the fire|watching the rain",
        "wipe it with a damp cloth|wax it once a year|keep it out of direct sun|tighten the screws now and then|"
        "vacuum the cushion gently|lift it, do not drag it",
        "cm tall|cm wide|cm deep",
        (40, 190),
        (2500, 38000),
        (45, 980),
    ),
    _family(  # tables and storage
        "bookcase+|side table|writing desk|chest of drawers+|coat rack|wardrobe+|shoe cabinet-|coffee table|sideboard+|"
        "bedside table-|shelf-|plant stand|console table|toy chest|dining table+|magazine rack-|storage bench",
        "oak|birch|walnut|reclaimed pine|bamboo|ash|smoked oak|lacquered steel|elm|mango wood",
        "two deep drawers|a hidden drawer|soft-closing doors|adjustable shelves|dovetail joints|a lift-up top|"
        "a cable slot|brass handles|rounded corners|a lower shelf|wheels that lock|a slatted base|a fold-down leaf",
        "narrow hallways|growing book collections|home offices|small bedrooms|busy family rooms|studio flats|"
        "houseplants and lamps|tidy entrances|writing letters|board games and jigsaws|guest rooms",
        "dust it with a soft cloth|wax it once a year|keep it away from radiators|use coasters|"
        "wipe up spills at once|fix it to the wall",
        "cm tall|cm wide|cm deep",
        (35, 210),
        (3000, 62000),
        (40, 1250),
    ),
    _family(  # lighting
        "desk lamp|floor lamp+|lantern|table lamp|pendant light|wall light|reading lamp|night light-|candle holder-|"
        "bedside lamp|ceiling lamp|torch-|string light|oil lamp|work light",
        "brass|frosted glass|smoked glass|brushed steel|rice paper|linen|turned oak|folded card|blackened iron|bamboo",
        "a dimmer switch|an adjustable arm|a cloth-covered cable|a weighted base|a warm bulb|a pull cord|"
        "a fold-flat shade|a touch switch|a timer|a hinged shade|three levels of light|a rechargeable battery|"
        "a soft amber glow",
        "late-night reading|cosy corners|dinner tables|dark hallways|bedside tables|homework and hobbies|"
        "summer terraces|close work at the desk|children afraid of the dark|long winter evenings|reading in bed",
        "dust the shade with a soft brush|unplug it before cleaning|wipe it with a dry cloth|use bulbs up to 40 watts|"
        "keep it away from curtains",
        "cm tall|cm wide|cm across",
        (9, 175),
        (200, 7200),
        (15, 420),
    ),
    _family(  # bags
        "backpack|tote bag|satchel|weekend bag+|suitcase+|laptop sleeve|messenger bag|purse-|wallet-|"
        "wash bag-|duffel bag+|"
        "camera bag|shopping bag|belt bag-|sports bag|school bag|briefcase",
        "waxed canvas|full-grain leather|recycled nylon|cotton canvas|cork|wool felt|oiled leather|sailcloth|"
        "ripstop fabric|vegan leather",
        "two hidden pockets|a padded strap|brass buckles|a waterproof zip|a roll-up top|a laptop pocket|"
        "a key clip|a magnetic clasp|a bottle holder|reinforced corners|a detachable strap|a striped lining|"
        "a name tag|quiet zips",
        "long train journeys|daily commutes|weekend escapes|carrying books and lunch|market days|city walks|"
        "business trips|gym sessions|school runs|cycling to work|overnight stays|airport queues",
        "wipe it with a damp cloth|treat it with wax once a year|let it dry in the open air|keep it out of the rain|"
        "brush off the dust|store it stuffed with paper",
        "cm wide|cm tall|cm long",
        (12, 75),
        (90, 3400),
        (15, 390),
    ),
    _family(  # outerwear
        "raincoat|cardigan|scarf-|jumper|bobble hat-|waistcoat|jacket|overcoat+|parka+|poncho|fleece|dressing gown+|"
        "sun hat-|shawl|blazer|overshirt",
        "merino wool|lambswool|organic cotton|linen|alpaca|waxed cotton|recycled polyester|tweed|boiled wool|corduroy|"
        "cashmere",
        "deep pockets|horn buttons|a storm collar|ribbed cuffs|a snug hood|a contrast lining|a two-way zip|"
        "a neat collar|elbow patches|a hidden pocket|a rolled hem|taped seams|a tie belt|a hanging loop",
        "windy beaches|rainy walks|autumn mornings|chilly offices|city weekends|travelling light|mountain huts|"
        "early dog walks|harbour strolls|garden work|cool summer nights|bonfire nights",
        "wash it cold|dry it flat|wash by hand|iron it on low heat|air it after wearing|brush it gently|"
        "keep it away from moths|turn it inside out to wash",
        "cm long",
        (24, 180),
        (80, 1900),
        (18, 340),
    ),
    _family(  # home textiles
        "blanket+|cushion-|rug+|tablecloth|bath towel|quilt+|throw|curtain+|tea towel-|doormat|pillowcase-|bedspread+|"
        "beach towel|table runner|wall hanging|hot-water bottle cover-",
        "washed linen|organic cotton|lambswool|jute|bamboo fibre|recycled wool|brushed cotton|silk|hemp|velvet",
        "a fringed edge|a woven border|a waffle texture|hand-tied tassels|a hidden zip|a quilted pattern|"
        "a herringbone weave|piped edges|a hanging loop|a wide stripe|a soft backing|embroidered corners|"
        "a checked pattern",
        "cold evenings|guest rooms|picnics in the park|lazy Sundays|reading corners|bare floors|festive tables|"
        "afternoon naps|draughty windows|seaside holidays|nursery floors|garden chairs",
        "wash it warm|wash it with similar colours|shake it out once a week|dry it in the shade|tumble it on low heat|"
        "iron it while damp|clean spots by hand",
        "cm long|cm wide",
        (40, 280),
        (90, 5200),
        (8, 320),
    ),
    _family(  # garden
        "watering can|trowel-|hand fork-|plant pot-|bird feeder|garden fork|wheelbarrow+|rake+|spade|planter|"
        "bird bath+|"
        "seed tray-|compost bin+|garden hose|pruning saw|kneeler|sundial|flower press|window box|insect house",
        "galvanised steel|terracotta|cedar|recycled plastic|copper|ash|larch|zinc|carbon steel|glazed clay",
        "a long spout|a comfortable grip|drainage holes|a fine rose|a hanging chain|a sharpened edge|"
        "two sturdy handles|"
        "a snap-on lid|a built-in gauge|a removable tray|a frost-proof finish|a leather loop|a sloping roof",
        "balcony gardens|spring planting|vegetable beds|herb pots|rose lovers|small terraces|school gardens|"
        "hungry sparrows and city bees|weekend gardening|allotments|deep borders|dry summers",
        "rinse off the soil after use|oil it before winter|bring it in before the frost|store it indoors|"
        "empty it in winter|sharpen it every spring",
        "cm long|cm tall",
        (12, 150),
        (120, 9500),
        (7, 190),
    ),
    _family(  # workshop tools
        "hammer|hand plane|toolbox|screwdriver-|spirit level|chisel-|hand saw|tape measure-|workbench+|pocket knife-|"
        "spanner|soldering iron|step ladder+|clamp|mallet|hand drill|utility knife-|sewing box",
        "forged steel|hickory|beech|stainless steel|aluminium|boxwood|brass|carbon steel|hardened steel|ash",
        "a balanced handle|a magnetic tip|a locking blade|a belt clip|a fold-out tray|a quick-release lever|"
        "engraved markings|a rubber grip|a protective sleeve|a spare blade|a lanyard hole|a fine adjustment screw",
        "small repairs|weekend projects|tight corners|building shelves|hanging pictures|bicycle repairs|model making|"
        "first workshops|careful joinery|jobs around the house|fixing what breaks",
        "keep it dry|wipe it with an oiled cloth|sharpen it when needed|store it in its sleeve|clean it after use|"
        "hang it up after work",
        "cm long",
        (9, 140),
        (60, 12000),
        (6, 260),
    ),
    _family(  # toys and games
        "puzzle|kite|toy train|dolls' house|chess set|rocking horse+|building set|spinning top-|teddy bear|marble run|"
        "yo-yo-|pull-along duck|card game-|stacking tower|hand puppet|scooter+|toy boat|board game|"
        "hobby horse+|music box-",
        "maple|beech|recycled cardboard|organic cotton|painted birch|felt|tin|rubberwood|cherry wood|lime wood",
        "rounded edges|a storage box|moving parts|a hidden compartment|a wind-up key|painted faces|a pull string|"
        "a cloth bag|bright stickers|a booklet of ideas|rubber wheels|numbered pieces|a small bell",
        "rainy afternoons|birthday parties|curious toddlers|family evenings|long car journeys|windy beaches|"
        "small hands|games with friends|grandparents and children|quiet play|holiday fun|playgroups",
        "wipe it with a damp cloth|keep it dry|wash it cold|keep small parts away from babies|store it in its box|"
        "dust it now and then",
        "cm long|cm tall",
        (6, 110),
        (50, 5200),
        (6, 175),
    ),
    _family(  # desk and paper
        "notebook|fountain pen-|desk organiser+|diary|sketchbook|pencil case|paperweight-|letter opener|photo album+|"
        "pen holder|wall calendar+|ring binder|address book|bookend|stamp set-|pencil sharpener-|folder|ruler|inkwell-",
        "recycled paper|bookcloth|brass|walnut|cork|vegetable-tanned leather|pressed card|aluminium|cherry wood|"
        "anodised steel",
        "rounded corners|a ribbon marker|an elastic band|numbered pages|a pocket at the back|a felt base|"
        "a fine steel nib|three compartments|a lay-flat spine|dotted pages|a hinged lid|a pencil loop|blank labels",
        "morning pages|travel sketches|busy desks|new students|careful note-takers|letters to friends|"
        "planning the week|meetings and lectures|holiday memories|poets and list-makers|tidy drawers",
        "keep it dry|dust it with a soft cloth|keep it out of direct sun|refill it when empty|polish it gently|"
        "store it upright",
        "cm long|cm wide",
        (7, 42),
        (30, 1300),
        (5, 120),
    ),
    _family(  # small electronics
        "radio|alarm clock|bluetooth speaker|record player+|camera|headset-|keyboard|power bank-|wall clock|"
        "thermometer-|"
        "weather station|phone stand-|metronome|desk fan|projector+|typewriter|calculator-|doorbell-|e-reader|"
        "microphone",
        "anodised aluminium|walnut|recycled plastic|brushed steel|moulded rubber|bamboo|ash|polycarbonate|cork|brass",
        "a rotary dial|a long-life battery|a fold-out stand|a backlit display|one large button|a braided cable|"
        "a carrying loop|two USB ports|a soft alarm|a silent motor|a solar panel|a headphone socket|a child lock",
        "kitchen counters|early risers|home offices|long flights|garden parties|light sleepers|music practice|"
        "small desks|video calls|travelling light|morning news|film nights at home",
        "wipe it with a dry cloth|charge it once a month|keep it away from water|unplug it when not in use|"
        "use only the cable supplied|remove the batteries before storing it",
        "cm wide|cm across",
        (6, 55),
        (60, 4600),
        (15, 480),
    ),
    _family(  # camping and sport
        "tent+|sleeping bag+|camp stove|water bottle-|hammock+|walking stick+|bicycle bell-|skipping rope-|"
        "yoga mat|kayak+|"
        "surfboard+|picnic basket|flask-|camping mug-|ice axe|compass-|climbing rope+|lunch box-|cool box+|"
        "fishing rod+|paddle+",
        "ripstop nylon|titanium|stainless steel|natural rubber|carbon fibre|anodised aluminium|cork|recycled plastic|"
        "willow|ash",
        "a carrying strap|a leakproof lid|a compact case|reflective stitching|a folding handle|a non-slip surface|"
        "a repair kit|a quick-drying cover|a padded grip|a wide opening|adjustable straps|a whistle|a bright pull tab",
        "mountain hikes|weekend camping|lake crossings|morning stretches|cold mornings|festival weekends|coastal walks|"
        "lightweight trips|picnics by the river|rough trails|first adventures|long days outdoors",
        "rinse it with fresh water|dry it before packing|wash by hand|air it after every trip|"
        "keep it out of direct sun|"
        "store it loosely rolled|check it before each trip",
        "cm long",
        (8, 320),
        (70, 21000),
        (9, 650),
    ),
    _family(  # bath, pets and music
        "soap dish-|bath mat|laundry basket+|mirror+|hairbrush-|toothbrush holder-|dog bed+|cat basket|"
        "dog lead|feeding bowl-|"
        "cat tree+|ukulele|tambourine-|wooden flute-|hand drum|music stand+|vase|picture frame-|"
        "umbrella stand+|hourglass-|"
        "umbrella+|jewellery box-|piggy bank-|wind chime",
        "bamboo|stoneware|brass|birch|recycled plastic|rosewood|beech|seagrass|cork|spruce|soapstone",
        "a soft lining|a non-slip base|a carved pattern|rubber feet|a hanging hook|a smooth finish|a raised edge|"
        "a hand-turned knob|a braided cord|a gift box|a gentle curve|a hidden magnet|an engraved maker's mark",
        "small bathrooms|sleepy companions|first lessons|bright windowsills|crowded hallways|family portraits|"
        "evening practice|guest bathrooms|gift givers|quiet mornings|rainy streets|shared flats",
        "wipe it with a damp cloth|rinse it once a week|keep it dry|polish it with a soft cloth|air it now and then|"
        "keep it away from heat",
        "cm long|cm wide|cm tall",
        (8, 130),
        (60, 6800),
        (6, 230),
    ),
)

COLOURS = _list(
    "moss green|deep blue|ivory|charcoal|brick red|mustard yellow|sky blue|chalk white|slate grey|plum|rust orange|"
    "olive|navy|cream|midnight blue|sage green|coral|sand|burgundy|teal|copper red|pale pink|lavender|jet black|"
    "butter yellow|forest green|stone grey|petrol blue|cherry red|apricot|chestnut brown|silver grey|mint green|"
    "honey yellow|pearl white|indigo|terracotta red|smoke grey|lilac|caramel"
)

STYLES = _list(
    "rustic|classic|modern|minimalist|retro|Nordic|simple|elegant|sturdy|lightweight|compact|old-fashioned|handmade|"
    "coastal|industrial|country|vintage|slim|robust|delicate"
)

PLACES = _list(
    "Portugal|Denmark|Japan|Wales|Sweden|Scotland|Italy|Finland|Vermont|Morocco|Brittany|Mexico|Norway|Ireland|Peru|"
    "Austria|Cornwall|Poland|India|Estonia|Tuscany|Quebec|Slovenia|Oregon|Greece|Vietnam|Bavaria|Spain|Maine|Iceland|"
    "Belgium|Chile|Turkey|Yorkshire|Kenya|Hungary|New Zealand|Kyoto|Lisbon|Bergen|Ghent|Oaxaca"
)

GUARANTEES = _list(
    "one year|two years|three years|four years|five years|seven years|ten years|twelve years|twenty years"
)

NAME_FIRST = _list(
    "Quiet|Silver|Little|Golden|Amber|North|Lucky|Old|Bright|Wild|Velvet|Winter|Summer|Blue|Copper|Misty|Honest|"
    "Brave|Gentle|Crimson|Open|River|Morning|Evening|Harbour|Hidden|Early|Ivory|Marble|Clever|Sunny|Highland|"
    "Salt|Stone|"
    "Seven|Paper|Rolling|Distant|Cedar|Proud|Merry|Iron|Southern|Autumn|Hollow|Pebble|Clear|Wandering|Green"
)

NAME_SECOND = _list(
    "Heron|Finch|Harbour|Meadow|Lantern|Fox|Willow|Anchor|Badger|Orchard|Comet|Otter|Bridge|Valley|Swallow|Maple|Tide|"
    "Hare|Beacon|Garden|Lark|Canyon|Sparrow|Field|Compass|Juniper|Falcon|Brook|Acorn|Whistle|Moth|Island|Thistle|Wren|"
    "Cottage|Robin|Hazel|Pine|Owl|Summit|Lagoon|Mill|Daisy|Kestrel|Sail|Chapel|Clover|Ridge|Star|Bell"
)

# An invented name is a beginning, perhaps a middle, and an end: Vel-mor-a, Tar-sin.
NAME_STARTS = _list(
    "Vel|Tar|Hal|Bro|Mar|Kes|Lun|Or|Fen|Gal|Pell|Sor|Tam|Wil|Nor|Esk|Dra|Cal|Jun|Ru|Bel|Ast|Qui|Lor|Hem|Zan|Ives|Ulm|"
    "Pri|Ans|Tor|Mil|Sel|Var|Ken|Dor|Al|Fal|Cor|Lin"
)
NAME_MIDDLES = _list("mor|ve|da|li|ro|ta|ner|bel|ka|si|lo|ren|mi|du|ga|tho|ra|wen|ni|sa")
NAME_ENDS = _list(
    "a|o|in|en|el|is|ton|den|low|wick|by|dale|ia|us|et|ina|ory|field|ster|une|ard|eth|ley|and|ora|ique|mere|"
    "ford|son|ette"
)
NAME_TAILS = _list("Mini|Junior|Duo|Plus|Grand|Classic|Solo|Original")
