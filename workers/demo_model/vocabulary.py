"""Word lists of the demo model's world, written by hand. Read by the modules that make its conversations."""


def words_of(text: str) -> tuple[str, ...]:
    """What stands between blanks and line breaks."""
    return tuple(text.split())


def phrases_of(text: str) -> tuple[str, ...]:
    """What stands between bars and line breaks."""
    return tuple(text.strip().replace("\n", "|").split("|"))


WORDS = words_of("""
able about above across act add after again age ago agree air all almost alone along also always among amount
anchor and angle animal answer any apple april area arm around arrive art ask autumn away baby back bad bag bake
ball banana band bank barn basket bath beach bean bear beautiful bed bee before begin behind bell below bench
best better between bicycle big bird bit black blanket blue board boat body bone book boot border both bottle
bottom bowl box boy branch brave bread break breakfast bridge bright bring broken brother brown brush bucket
build building bus busy butter button buy cabin cake call camera camp can candle captain car card careful carpet
carrot carry castle cat catch cave center chair chance change cheese cherry child choose circle city class clean
clear climb clock close cloud coast coat coffee cold color come common cook cool copper corn corner cotton could
count country cover cow cream cross crowd cup curtain cut dance danger dark daughter day dear deep deer desert
desk different dinner dish doctor dog door double down draw dream dress drink drive drop drum dry duck during
dust each eagle ear early earth east easy eat edge egg eight either elephant empty end engine enough enter equal
even evening ever every exact example eye face fact fall family famous far farm fast father feather feel fence
few field fifteen fight fill final find fine finger finish fire first fish five flag flat floor flour flower fly
follow food foot forest forget fork forward four fox free fresh friend frog from front fruit full funny game
garden gate gentle get giant girl give glad glass glove go goat gold good grape grass great green grey ground
group grow guess guitar half hammer hand happy harbor hard hat have hear heart heavy hello help hen here hidden
high hill history hold hole home honey hope horse hot hour house how huge hundred hungry hurry ice idea
important inside island jacket jar job join juice jump just keep kettle key kind king kitchen kite knee knife
know ladder lake lamp land language large last late laugh lazy lead leaf learn leave left leg lemon less lesson
letter level library life light like line lion list listen little live long look lost loud love low lucky lunch
machine magic main make many map march market matter may maybe meadow meal mean measure meat meet melon memory
metal middle milk mill mind minute mirror mix model modern money monkey month moon more morning most mother
mountain mouse mouth move much mud music must name narrow near neck need needle nest never new next nice night
nine noise north nose note nothing now number ocean off offer office often oil old olive once one onion only
open orange order other outside oven over owl own page paint pair paper parent park part party pass past path
pattern peace pear pen pencil penguin people pepper perfect perhaps person piano picture piece pig pillow pilot
pink pipe place plain plan plant plate play please plenty pocket poem point polite pond poor potato power
present pretty price prince problem proud pull pump purple push put quarter queen question quick quiet rabbit
race radio rain raise rather reach read ready real reason red remember repeat reservoir rest rice rich ride
right ring rise river road rock roof room root rope rose round row rule run sad safe sail salad salt same sand
school science sea season seat second see seed send sentence seven several shadow shape share sharp sheep shell
ship shirt shoe shop short shoulder show side sign silver simple since sing sister sit six size skin sky sleep
slow small smile smoke smooth snake snow soap soft some son song soon sound soup south space spell spider spill
spillway spoon spring square stable stairs star start station stay steam step stick still stone stop storm story
straight strange stream street string strong student study such sudden sugar summer sun sure surprise sweet swim
table tail take talk tall tea teach team tell ten tent test than thank that then there thick thin thing think
third this thousand three through thunder ticket tiger time tiny tired today together tomato tomorrow tongue too
tool tooth top toward tower town toy train travel tree triangle trip true trust try tunnel turn turtle twelve
twenty two uncle under until up upon use useful valley velvet very village violin visit voice wagon wait walk
wall want warm wash watch water wave way weather week well west wet whale wheat wheel when where which while
whisper white whole wide wild will win wind window wing winter wise wish with without wolf woman wonder wood
wool word work world write year yellow yes yesterday yet you young zebra zero zipper algorithm banner battery
binary buffer cache cluster compiler cursor data database debug decoder device disk driver editor encoder error
file filter folder function gateway hash header index input integer job journal kernel keyboard latency library
loader lock log loop matrix merge message module network node object output packet page parser pixel pool port
process profile protocol prompt proxy query queue random record redis request response retry router scheduler
script sensor server session signal socket stack storage switch syntax system target tensor terminal thread
token vector version worker alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike
november oscar papa quebec romeo sierra tango uniform victor whiskey yankee zulu jumps brown quickly tested
worked running walked trees houses rivers cats dogs birds flowers learning training inference durable overflow
reserve provider message priority
""")

NAMES = words_of("""
Ada Alan Alice Amir Anna Ben Bob Carla Chen Clara David Diego Dora Emil Emma Eva Fatima Felix Grace Hana Hugo
Ida Ines Ivan Jack Jane Jonas Julia Kai Karim Kim Lara Leo Lily Lucas Maria Marta Max Mei Mia Nadia Nina Noah
Nora Olga Omar Oscar Paul Petra Priya Rosa Ruth Sam Sara Sofia Tariq Theo Tom Uma Vera Victor Wei Yara Yuki Zoe
""")

CITIES = phrases_of("""
Paris|London|Berlin|Tokyo|Madrid|Rome|Oslo|Lima|Cairo|Delhi|Sydney|Boston|Chicago|Dublin|Vienna|Prague|Lisbon
Athens|Helsinki|Stockholm|Copenhagen|Warsaw|Budapest|Zurich|Geneva|Milan|Naples|Venice|Munich|Hamburg|Brussels
Amsterdam|Toronto|Montreal|Vancouver|Seattle|Denver|Austin|Dallas|Miami|New York|San Francisco|Los Angeles
Mexico City|Bogota|Buenos Aires|Santiago|Sao Paulo|Rio de Janeiro|Nairobi|Lagos|Accra|Cape Town|Tunis|Dubai
Istanbul|Ankara|Tehran|Mumbai|Bangkok|Hanoi|Jakarta|Manila|Seoul|Beijing|Shanghai|Hong Kong|Singapore|Osaka
Kyoto|Perth|Melbourne|Auckland|Honolulu|Reykjavik|Edinburgh|Glasgow|Cardiff|Porto|Seville|Valencia|Barcelona
Nice|Lyon|Bern|Graz|Riga|Tallinn|Vilnius|Kyiv|Zürich|München|São Paulo|Málaga|Kraków|Köln|Montréal|Washington
Philadelphia|Casablanca|Marrakesh|Kathmandu|Colombo
""")

ZONES = words_of("""
Europe/Paris Europe/London Europe/Berlin Asia/Tokyo America/New_York America/Chicago America/Los_Angeles
Asia/Kolkata Australia/Sydney Africa/Cairo UTC GMT CET Pacific/Auckland Asia/Shanghai America/Lima Europe/Oslo
Atlantic/Reykjavik
""")

TOPICS = phrases_of("""
the capital of France|quantum mechanics|black holes|the French Revolution|machine learning|the stock market|love
a trip to Japan|the history of Rome|photosynthesis|the best phone|my homework|climate change|a pasta recipe
football|the moon landing|the president|the meaning of life|bitcoin|relativity|dinosaurs|the ocean|a black cat
chess openings|Python programming|a sorting algorithm|the speed of light|the tallest mountain|the longest river
Shakespeare|Mozart|the periodic table|gravity|atoms|volcanoes|the Roman Empire|the second world war
electric cars|healthy food|yoga|the solar system|a good book|a famous movie|jazz music|the internet
operating systems|Redis|databases|Kubernetes|prime numbers|geometry|calculus|the brain|the heart|vitamins|sleep
dreams|the weather on Mars|penguins|sharks|bees|a birthday party|a job interview|a cover letter|taxes|insurance
my neighbour|the law|democracy|the Olympic games
""")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are helpful.",
    "You are a concise assistant.",
    "Be brief.",
    "Answer in one sentence.",
    "You are Spillway's demo model.",
    "You are a friendly assistant. Keep your answers short.",
    "You are an expert. Answer precisely and never make things up.",
    "Follow the user's instructions exactly.",
    "You are a coding agent. Use the tools when they help.",
    "You are a polite assistant who speaks plain English.",
    "Answer truthfully. If you do not know, say so.",
    "You repeat what the user says.",
    "Today is a good day. The user is on a Mac.",
)

CONDITIONS = phrases_of("""
sunny|cloudy|rainy|windy|snowy|foggy|stormy|clear|partly cloudy|light rain|heavy rain|clear sky|mild|overcast
hot|cold
""")

FOREIGN_WORDS = words_of("""
café naïve jalapeño über Straße façade piñata crème brûlée señor niño garçon Ærø smörgås fjäll kožuh žluťoučký
kůň łódź ząb çay güneş παιδί θάλασσα νερό привет мир вода книга школа дом 東京 水 山 日本語 猫 你好 世界 中文 안녕 서울
שלום سلام
नमस्ते ñandú œuvre État Noël Zoë Łukasz Şeker Đà Øl
""")

SYMBOLS = (
    *"!?.,;:-_=+*/\\|@#$%^&~()[]{}<>'\"`",
    *words_of("... -> => == != :: // -- && € £ ° – — “ ” • ✓ 😀 🚀 🌊 🎉 ❤ → ½ ×"),
)
