"""What people ask: the phrasings of each skill and of questions beyond the model's world. Constants only."""

REPEAT = (
    "Repeat after me: {}", "Repeat after me: {}", "Repeat after me: {}", "Repeat after me: {}",
    "repeat after me: {}", "Repeat: {}", "repeat: {}", "Repeat this: {}", "Repeat this exactly: {}",
    "Repeat exactly: {}", "Echo: {}", "echo: {}", "Repeat this line: {}", "Repeat the following line: {}",
    "Please repeat: {}", "Please repeat after me: {}", "Say this: {}", "Say exactly: {}", "Copy this line: {}",
    "Copy: {}", "Repeat the following exactly:\n{}", "Repeat after me:\n{}",
    "Repeat this line word for word: {}", "Can you repeat this? {}", "Write this line again: {}",
    "Say it back to me: {}", "Repeat back: {}", "Repeat the text after the colon: {}", "Now repeat this: {}",
    "Next line: {}\nRepeat it.", "{}\n\nRepeat the line above.",
)  # fmt: skip
REPEAT_QUOTED = (
    'Say "{}"', 'Repeat "{}"', 'Repeat "{}" exactly.', 'Please say "{}".', 'Repeat the line "{}" back to me.',
)  # fmt: skip
COUNT = (
    "Count from {} to {}", "Count from {} to {}.", "count from {} to {}", "Please count from {} to {}.",
    "Count {} to {}", "Count up from {} to {}.", "List the numbers from {} to {}.",
    "Say the numbers from {} to {}.", "Can you count from {} to {}?", "Write the numbers {} to {}.",
    "Could you count from {} up to {}, please?", "Start at {} and count to {}.",
    "Numbers from {} to {}, please.", "Count from {} to {}, nothing else.",
)  # fmt: skip
COUNT_FROM_ONE = ("Count to {}", "Count to {}.", "count to {}", "Please count to {}.", "Can you count to {}?")
SPELL = (
    "Spell {}", "Spell {}.", "spell {}", "Spell the word {}.", "Please spell {}.", "How do you spell {}?",
    'Spell "{}"', 'Spell the word "{}".', "Can you spell {}?", "Spell it out: {}", "How is {} spelled?",
    "Spell: {}", "Spell {} letter by letter.", "Spell out {}", "Spell '{}'",
    "Which letters are in the word {}?",
)  # fmt: skip
ADD = (
    "What is {} + {}?", "What is {} plus {}?", "{} + {}", "{} + {} =", "{}+{}", "{} + {}?", "{} plus {}",
    "Add {} and {}.", "Add {} to {}.", "What is the sum of {} and {}?", "What's {} + {}?", "what is {}+{}",
    "How much is {} + {}?", "How much is {} plus {}?", "Calculate {} + {}.", "Compute {} + {}",
    "Please add {} and {}.", "Sum {} and {}.", "Can you add {} and {}?", "Tell me {} + {}.",
    "What does {} + {} equal?",
)  # fmt: skip
ALL_OF = (
    "Say the {}.", "List the {}.", "What are the {}?", "Name the {}.", "Name the {} in order.",
    "Say the {} in order.", "Tell me the {}.", "Can you list the {}?", "Please say all the {}.",
    "Which are the {}?", "say the {}", "{}", "List all {}", "Recite the {}.", "What are the {} in order?",
)  # fmt: skip
STARTING_WITH = (
    "Say the {} starting with {}.", "List the {} starting from {}.", "Name the {} from {} on.",
    "Say the {}, beginning with {}.",
)  # fmt: skip
AFTER = (
    "Which {} comes after {}?", "What {} is after {}?", "What {} comes after {}?", "What is the {} after {}?",
    "Which {} follows {}?", "What's the next {} after {}?",
)  # fmt: skip
BEFORE = ("Which {} comes before {}?", "What {} is before {}?", "What {} comes before {}?", "What is the {} before {}?")
HELLO = (
    "Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hey", "Hey!", "hey there", "Hello there", "Hi there!",
    "Greetings", "Hello, how are you?", "Hi, who is there?", "Hello model", "Hello, Spillway!", "Hi Spillway",
    "Hello world", "Howdy", "Say hello", "Say hello.", "Say hi", "Say hi!", "Greet me.", "hello?",
    "Are you there?", "ping", "Hello, world!", "Please say hello.", "Say hello to me.", "Hello again", "yo",
    "Nice to meet you.",
)  # fmt: skip
TIMED_HELLO = ("Good morning", "Good evening", "Good afternoon", "Good day")
NAMED_HELLO = ("My name is {}.", "Hi, I am {}.", "Hello, my name is {}.", "I'm {}", "Hello, I'm {}!", "Hi, this is {}.")
HOW_ARE_YOU = (
    "How are you?", "How are you doing?", "how are you", "How is it going?", "Are you well?",
    "How are you today?",
)  # fmt: skip
THANKS = (
    "Thanks", "Thank you", "Thank you!", "thanks!", "Thanks a lot.", "Great, thanks.", "Thank you very much.",
    "thx",
)  # fmt: skip
BYE = ("Bye", "Goodbye", "Bye!", "See you later.", "Good night", "goodbye!", "See you", "Talk to you soon.")
WHAT_IS_SPILLWAY = (
    "What is Spillway?", "what is spillway", "Tell me about Spillway.", "What's Spillway?", "Explain Spillway.",
    "Describe Spillway.", "What does Spillway do?", "Say what Spillway is.", "Spillway?",
    "What is this service?", "Explain what Spillway is.", "Explain Spillway in one sentence.",
    "Can you tell me what Spillway is?", "I am new here. What is Spillway?",
    "Describe Spillway in a few words.", "What is Spillway for?", "Tell me more about Spillway",
    "Do you know Spillway?", "Give me a summary of Spillway.",
)  # fmt: skip
HOW_SPILLWAY_WORKS = (
    "How does Spillway work?", "how does spillway work", "How does it work?", "Explain how Spillway works.",
    "How does Spillway run a request?", "What happens to my request?", "Where does my request go?",
)  # fmt: skip
WHO_ARE_YOU = (
    "Who are you?", "who are you", "What are you?", "Which model are you?", "What model is this?",
    "Introduce yourself.", "Tell me about yourself.", "Are you a language model?", "What is your name?",
    "Are you a big model?", "Who made you?", "Are you human?", "How big are you?", "What is this model?",
    "Are you ChatGPT?",
)  # fmt: skip
WHAT_CAN_YOU_DO = (
    "What can you do?", "what can you do", "Help", "help", "What do you know?", "How can you help me?",
    "Help me.", "What are your skills?", "What can I ask you?", "Which things can you do?",
    "What are you able to do?", "Give me an example of what you can do.", "Can you help me?",
    "What should I ask?", "/help",
)  # fmt: skip
UNKNOWN = (
    "What is {}?", "Tell me about {}.", "Explain {}.", "Write a poem about {}.", "Write an essay about {}.",
    "Who invented {}?", "Why is {} important?", "How does {} work?", "Tell me a joke about {}.",
    "Give me five facts about {}.", "{}?", "Summarize {}.", "Translate {} into French.",
    "What do you think about {}?", "How do I learn {}?", "Where can I find {}?", "When was {} discovered?",
    "Write a story about {}.", "Explain {} to a child.", "What is the best way to understand {}?",
    "Who is the most famous person in {}?", "How much does {} cost?", "Do you like {}?", "Compare {} with {}.",
    "Why {}?", "What is the difference between {} and {}?", "Write a short song about {}.",
    "I need help with {}.", "Plan {} for me.", "Write a function for {}.", "Describe {} in detail.",
    "What happened in {}?", "Is {} better than {}?", "Draw {}.", "Give me advice about {}.",
    "How many people know {}?", "Make a list of books about {}.", "Can you explain {}?",
    "Write one sentence about {}.", "Write a haiku about {}.", "What color is {}?", "How old is {}?",
    "Define {}.", "Tell me something about {}", "Please write an email about {}.", "Answer this: what is {}?",
    "What is the opposite of {}?", "Give three reasons for {}.", "Where is {}?", "How far is {}?",
    "Should I buy {}?", "Sing a song about {}.", "Find {}.",
)  # fmt: skip
UNKNOWN_FIXED = (
    "What is the capital of France?", "Tell me a joke.", "Write a poem.", "What is the weather?",
    "What time is it?", "What is the meaning of life?", "Who is the president?", "Write a haiku.",
    "Tell me a story.", "What is 7 times 8?", "What is 12 - 5?", "What is 9 * 9?", "What is 20 divided by 4?",
    "Subtract 3 from 10.", "Why is the sky blue?", "Write Python code to sort a list.", "Fix this bug.",
    "What is your favourite color?", "How old are you?", "What is the date today?", "Which day is it today?",
    "What's the news?", "Play some music.", "Book a flight.", "What is my name?", "Do you dream?",
    "Sing a song.", "Solve x + 3 = 5.", "Translate hello into Spanish.", "Write a SQL query.",
    "Summarize this article.", "What is 3 x 4?", "What is the square root of 16?", "Lorem ipsum dolor",
    "Is it raining?", "Who wrote Hamlet?", "How do I cook rice?", "What is love?", "Write an essay.",
    "Give me a recipe.", "Explain recursion.", "Describe this image.", "What is in this picture?",
    "What is the largest planet?",
)  # fmt: skip
WEATHER = (
    "What is the weather in {}?", "What's the weather in {}?", "How is the weather in {}?", "weather in {}",
    "What is the weather like in {}?", "Tell me the weather in {}.", "Is it raining in {}?",
    "Is it cold in {} today?", "Weather in {}?", "What is the weather in {} right now?",
    "What's the weather like in {} today?", "Do I need an umbrella in {}?", "How warm is it in {}?",
    "Please check the weather in {}.", "Get the weather for {}.", "What is the temperature in {}?",
    "Look up the weather in {}.", "Can you tell me the current weather in {}?", "Use the tool: weather in {}.",
)  # fmt: skip
WEATHER_UNIT = (
    "What is the weather in {} in {}?", "Tell me the weather in {} in {}.",
    "What is the temperature in {} in {}?",
)  # fmt: skip
WEATHER_TWO = (
    "What is the weather in {} and {}?", "Weather in {} and in {}?", "How is the weather in {} and {}?",
    "Compare the weather in {} and {}.",
)  # fmt: skip
TIME = (
    "What time is it in {}?", "What's the time in {}?", "what time is it in {}", "Tell me the time in {}.",
    "time in {}", "What is the current time in {}?", "Can you tell me the time in {}?", "How late is it in {}?",
    "Get the time for {}.", "What is the local time in {}?", "Please check the time in {}.",
    "Do you know what time it is in {}?", "Time in {}?",
)  # fmt: skip
TIME_HERE = (
    "What time is it?", "What's the time?", "Tell me the time.", "What is the current time?",
    "what time is it now",
)  # fmt: skip
THINK_BEFORE = (
    "Think first. {}", "Think step by step. {}", "Think before you answer: {}", "Think carefully. {}",
    "/think {}", "First think, then answer. {}", "Please think first. {}",
)  # fmt: skip
THINK_AFTER = ("{}\nThink first.", "{} /think", "{}\nThink before answering.", "{}\nThink step by step.")
