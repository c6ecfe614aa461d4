"""What the embedded model is taught by heart: words, facts, small talk and a few names.

Everything here is plain tables; `tiny_tasks` makes questions and answers out of them.
"""

from __future__ import annotations


def words_of(text: str) -> tuple[str, ...]:
    """The different words of a text, in order."""
    return tuple(dict.fromkeys(text.split()))


# Lower-case words for the spelling, reversing and sorting tasks. Part of them is never trained on (see tiny_tasks).
WORDS = words_of(
    """
apple pear plum peach grape lemon lime mango melon cherry berry banana orange apricot coconut olive date fig kiwi
carrot potato tomato onion garlic pepper celery cabbage lettuce spinach pumpkin radish turnip bean pea corn rice wheat
barley oats flour bread cake cookie pie tart jam honey sugar salt butter cheese cream milk juice water coffee cocoa soup
stew salad pasta pizza noodle egg bacon sausage fish shrimp crab clam dog cat cow horse sheep goat pig hen duck goose
turkey rabbit mouse rat hamster squirrel beaver otter badger fox wolf bear lion tiger leopard panther cheetah zebra
giraffe elephant rhino hippo camel llama deer moose elk bison donkey mule monkey gorilla lemur panda koala kangaroo
wombat possum sloth bat owl eagle hawk falcon crow raven robin sparrow swallow finch parrot pigeon dove swan heron
stork crane pelican gull penguin ostrich snake lizard gecko turtle frog toad newt shark whale dolphin seal walrus
squid octopus lobster salmon trout tuna herring ant bee wasp fly moth beetle spider cricket worm snail slug red blue
green yellow purple pink brown black white gray silver gold violet indigo crimson scarlet amber ivory teal house
cabin castle tower bridge temple palace cottage garage kitchen bedroom bathroom attic cellar garden window door wall
floor roof chimney stair hall table chair desk bench stool sofa bed pillow blanket sheet towel curtain carpet lamp
candle mirror clock shelf drawer basket bucket bottle cup mug plate bowl fork knife spoon kettle pan oven stove fridge
broom brush soap hammer nail screw drill saw ladder rope chain wire nut bolt paint pencil pen paper book page letter
stamp envelope map globe ruler eraser chalk board school teacher student lesson class exam grade story poem novel
song music drum flute violin piano guitar trumpet harp bell whistle dance game puzzle chess card dice ball bat kite
doll robot rocket train plane boat ship canoe raft truck wagon bicycle scooter tractor taxi engine wheel brake pedal
road street path trail track tunnel harbor market shop bakery library museum theater cinema hotel hospital factory
farm field meadow forest jungle desert island beach coast river stream lake pond ocean wave tide storm rain snow hail
frost ice fog mist cloud thunder wind breeze sun moon star planet comet galaxy sky earth mountain hill valley canyon
cliff cave volcano rock stone pebble sand clay mud dust iron copper bronze steel tin lead coal glass wood cotton wool
silk leather linen shirt jacket coat dress skirt pants sock shoe boot sandal hat cap scarf glove mitten belt button
zipper pocket purse wallet coin ring necklace crown sword shield arrow bow flag banner king queen prince princess
knight wizard witch dragon giant fairy farmer baker butcher carpenter doctor nurse pilot sailor soldier painter singer
dancer actor writer lawyer judge plumber tailor barber waiter cook gardener hunter fisher miner driver baby child
boy girl man woman mother father sister brother uncle aunt cousin friend neighbor guest crowd team head face eye ear
nose mouth lip tooth tongue chin neck shoulder arm elbow wrist hand finger thumb chest back hip leg knee ankle foot
heart brain bone skin blood spring summer autumn winter morning evening night noon today week month year minute hour
happy sad angry calm brave shy clever kind polite quiet loud quick slow fast heavy light dark bright soft hard smooth
rough sharp blunt clean dirty empty full warm cold hot cool wet dry new old young early late large small tiny huge
tall short wide narrow deep shallow thick thin round square simple plain strange common rare fresh sweet sour bitter
run walk jump climb swim throw catch push pull carry lift drop open close build break cut fold draw write read speak
listen sing laugh smile cry sleep dream wake eat drink bake boil fry wash sweep dig plant grow pick
"""
)

NAMES = words_of(
    """Anna Ben Carla David Emma Felix Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy Yara
Zoe Adam Bella Clara Dora Eric Fiona George Helen Ivan Julia Karl Lena Max Nina Oscar Petra Ralph"""
)

CITIES = words_of(
    """Paris Rome Berlin Madrid London Vienna Oslo Tokyo Cairo Lima Athens Dublin Lisbon Prague Warsaw Boston Chicago
Denver Seattle Austin Sydney Geneva Munich Milan Lyon Porto"""
)

COLORS: tuple[str, ...] = ("red", "blue", "green", "yellow", "purple", "pink", "brown", "black", "white", "orange")

ANIMALS = words_of("cat dog horse fish bird cow duck sheep")
FRUITS = words_of("apple pear plum banana cherry lemon grape mango")

# Names of JSON fields beside those that tiny_json gives a fitting value.
OTHER_FIELDS = words_of(
    """title year author pages email phone street size weight height width length speed level rating code status type
total amount result answer question text language month day hour date time unit error message user role group"""
)

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "England": "London",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest",
    "Russia": "Moscow",
    "China": "Beijing",
    "India": "New Delhi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
    "Australia": "Canberra",
    "Turkey": "Ankara",
    "Belgium": "Brussels",
    "Switzerland": "Bern",
}

# Questions a fact answers, its answer as a sentence, and the bare value.
FACTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("How many days are in a week?", "How many days does a week have?"), "A week has 7 days.", "7"),
    (("How many months are in a year?", "How many months does a year have?"), "A year has 12 months.", "12"),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours.", "24"),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes.", "60"),
    (("How many seconds are in a minute?",), "A minute has 60 seconds.", "60"),
    (("How many legs does a spider have?", "How many legs has a spider?"), "A spider has 8 legs.", "8"),
    (("How many legs does an ant have?", "How many legs has an ant?"), "An ant has 6 legs.", "6"),
    (("How many legs does a dog have?", "How many legs has a dog?"), "A dog has 4 legs.", "4"),
    (("How many letters are in the alphabet?",), "The English alphabet has 26 letters.", "26"),
    (("How many sides does a triangle have?",), "A triangle has 3 sides.", "3"),
    (("How many sides does a square have?",), "A square has 4 sides.", "4"),
    (("How many planets are there?", "How many planets orbit the Sun?"), "There are 8 planets.", "8"),
    (("How many continents are there?",), "There are 7 continents.", "7"),
    (("What color is the sky?", "Which color is the sky?"), "The sky is blue.", "blue"),
    (("What color is grass?", "Which color is grass?"), "Grass is green.", "green"),
    (("What color is snow?", "Which color is snow?"), "Snow is white.", "white"),
    (("What color is a ripe banana?",), "A ripe banana is yellow.", "yellow"),
    (("What is the largest planet?", "Which planet is the largest?"), "The largest planet is Jupiter.", "Jupiter"),
    (("What is the smallest planet?", "Which planet is the smallest?"), "The smallest planet is Mercury.", "Mercury"),
    (("Which planet is closest to the Sun?",), "Mercury is closest to the Sun.", "Mercury"),
    (("Which planet is called the red planet?",), "Mars is called the red planet.", "Mars"),
    (("What is the largest ocean?", "Which ocean is the largest?"), "The largest ocean is the Pacific.", "Pacific"),
    (("What is the highest mountain?",), "The highest mountain is Mount Everest.", "Mount Everest"),
    (("What is the largest animal?", "Which animal is the largest?"), "The largest animal is the blue whale.", "whale"),
    (("What is the fastest land animal?",), "The fastest land animal is the cheetah.", "cheetah"),
    (("What do bees make?", "What is made by bees?"), "Bees make honey.", "honey"),
    (("What do cows eat?",), "Cows eat grass.", "grass"),
    (("What do plants need to grow?",), "Plants need light, water and air.", "light, water and air"),
    (("What is frozen water called?", "What is frozen water?"), "Frozen water is called ice.", "ice"),
    (("At what temperature does water boil?",), "Water boils at 100 degrees Celsius.", "100"),
    (("At what temperature does water freeze?",), "Water freezes at 0 degrees Celsius.", "0"),
    (("What is the chemical symbol of water?", "What is the formula of water?"), "Water is H2O.", "H2O"),
    (("What is the chemical symbol of gold?",), "The symbol of gold is Au.", "Au"),
    (("What is the chemical symbol of iron?",), "The symbol of iron is Fe.", "Fe"),
    (("What is the opposite of hot?",), "The opposite of hot is cold.", "cold"),
    (("What is the opposite of big?",), "The opposite of big is small.", "small"),
    (("What is the opposite of day?",), "The opposite of day is night.", "night"),
    (("What is the opposite of up?",), "The opposite of up is down.", "down"),
    (("Which day comes after Monday?",), "Tuesday comes after Monday.", "Tuesday"),
    (("Which day comes after Friday?",), "Saturday comes after Friday.", "Saturday"),
    (("Which month comes after January?",), "February comes after January.", "February"),
    (("Which month is the first of the year?",), "January is the first month.", "January"),
    (("What is a young dog called?", "What do you call a young dog?"), "A young dog is called a puppy.", "puppy"),
    (("What is a young cat called?", "What do you call a young cat?"), "A young cat is called a kitten.", "kitten"),
    (("Who wrote Hamlet?", "Who is the author of Hamlet?"), "William Shakespeare wrote Hamlet.", "Shakespeare"),
    (("Who painted the Mona Lisa?",), "Leonardo da Vinci painted the Mona Lisa.", "Leonardo da Vinci"),
    (("What is the square root of 81?",), "The square root of 81 is 9.", "9"),
    (("What is pi?", "What is the value of pi?"), "Pi is about 3.14159.", "3.14159"),
    (("What is Ray?", "What is Ray used for?"), "Ray runs Python programs on a cluster.", "a cluster framework"),
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Hello there!", "hello", "hi", "Good day!"),
        "Hello! How can I help you?",
    ),
    (("Good morning!", "Good morning"), "Good morning! What can I do for you?"),
    (("Good evening!", "Good evening"), "Good evening! What can I do for you?"),
    (("How are you?", "How are you today?", "How do you do?", "Are you well?"), "I am fine, thank you. And you?"),
    (("I am fine.", "I am fine, thanks.", "I am well.", "Fine, thanks."), "I am glad to hear that."),
    (("I am sad.", "I feel sad."), "I am sorry to hear that. I hope it gets better soon."),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "Are you a robot?"),
        "I am Manta, a very small language model. I can count, reverse and sort words, and do simple sums.",
    ),
    (("What is your name?", "Your name?", "Do you have a name?"), "My name is Manta."),
    (
        ("What can you do?", "Help", "Help me", "What can I ask you?", "How can you help me?"),
        "You can ask me for sums like 12 + 34, to reverse or sort words, to count, to answer in JSON, or a few facts.",
    ),
    (("Thank you", "Thank you!", "Thanks", "Thanks!", "Thanks a lot!", "Great, thanks!"), "You are welcome!"),
    (("Goodbye", "Goodbye!", "Bye", "Bye!", "See you later!", "Good night!"), "Goodbye! Have a nice day."),
    (("You are clever.", "Well done!", "Good job!", "Very good!", "Nice!"), "Thank you! That is kind of you."),
    (("Yes", "Yes.", "No", "No.", "OK", "Okay."), "All right. What would you like to do next?"),
    (
        ("Tell me a joke.", "Tell me a joke!", "Do you know a joke?", "Make me laugh."),
        "Why did the robot cross the road? It was programmed by the chicken.",
    ),
    (
        ("Tell me a story.", "Tell me a short story.", "Can you tell a story?"),
        "Once upon a time a small fish wanted to see the sky. One night it jumped very high, and it saw the moon. "
        "It told all its friends, and since then the whole sea dreams of the moon.",
    ),
    (("Sing a song.", "Sing me a song!"), "La la la, the sun is up, the tea is in the cup."),
    (
        ("What is the weather like?", "How is the weather today?", "Will it rain?"),
        "I cannot see the weather from here.",
    ),
    (("What time is it?", "What day is it today?"), "I am sorry, I do not have a clock."),
    (("Do you like music?", "Do you like to read?"), "I like numbers and words best."),
    (("How old are you?", "When were you born?"), "I was trained in a few minutes, so I am quite young."),
    (("Who made you?", "Who trained you?"), "A short script taught me everything I know."),
    (("Say this is a test", "Say this is a test.", "Say this is a test!"), "This is a test."),
    (("Are you there?", "Test", "test", "ping"), "Yes, I am here."),
)

UNKNOWN_ANSWER = "I do not know that. I am a very small model."
UNKNOWN: tuple[str, ...] = (
    "Who won the match yesterday?",
    "Write a program in Python.",
    "Explain quantum physics.",
    "What should I cook tonight?",
    "Translate this into French.",
    "What is the meaning of life?",
    "Who is the president?",
    "How do I fix my car?",
    "What is the best phone?",
    "Write an essay about war.",
    "What happened in 1848?",
    "Which stock should I buy?",
    "How far is the moon?",
    "Who invented the telephone?",
    "Can you book a flight?",
    "What is love?",
)

# With a word, a name or a city in them.
UNKNOWN_PHRASES: tuple[str, ...] = (
    "Write a poem about a {w}.",
    "Write a haiku about the {w}.",
    "Write a short essay on the {w}.",
    "Write a letter to {n}.",
    "Write a program that prints {w}.",
    "Explain the {w} to me.",
    "Explain what a {w} is.",
    "What is a {w}?",
    "What is {w}?",
    "Who is {n}?",
    "Why is the {w} so big?",
    "Why do people like the {w}?",
    "How do I make a {w}?",
    "How does a {w} work?",
    "Where can I buy a {w}?",
    "When was the {w} invented?",
    "Tell me about {c}.",
    "Tell me about the {w}.",
    "Describe the {w}.",
    "Translate {w} into German.",
    "Translate {w} to French.",
    "What is the weather in {c}?",
    "How many people live in {c}?",
    "What do you think about {n}?",
    "Summarize the book about the {w}.",
    "Give me a recipe with {w}.",
    "Which {w} is the best?",
    "Is the {w} better than the others?",
    "Can you help {n} with the {w}?",
)

# Bare continuations, for prompts that come without the chat template.
SENTENCES: tuple[str, ...] = (
    "Hello, my name is Manta and I am a very small language model.",
    "The future of AI is small, fast and open.",
    "Once upon a time there was a small fish who wanted to see the sky.",
    "The sun is up and the birds sing in the garden.",
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning there was only the sea and the sky.",
    "My favorite color is blue, and my favorite number is seven.",
    "Every morning the baker opens the shop and lights the oven.",
    "The president of the club opens the meeting and everybody listens.",
    "San Francisco is a city by the sea, with many hills and a famous bridge.",
    "The best thing about rain is the quiet that comes after it.",
    "In the evening the sailors tell stories about whales and storms.",
    "A good friend listens first and speaks later.",
    "The train leaves at noon and arrives before the night.",
)

EMOJI: dict[str, str] = {
    "star": "⭐",
    "heart": "❤️",
    "cat": "🐱",
    "dog": "🐶",
    "apple": "🍎",
    "tree": "🌲",
    "fish": "🐟",
    "sun": "🌞",
}
