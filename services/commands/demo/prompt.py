"""The demo's text (written for this project) and how a prompt of a wanted length is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable

QUESTION = "What happened in the winter of the great storm?"

TEXT = """\
The Bell Tower of Sorvik

Sorvik is a small fishing town at the end of a long and narrow bay. Its houses are painted red and yellow, so that
the boats can find them in the grey light of the morning. For many years the town had no lighthouse. The older
fishermen said that a lighthouse was not needed, because every child in Sorvik learned the rocks by name before it
learned to read. There was the Widow, which stood alone in the middle of the channel. There were the Three Sisters,
close to the northern shore, and there was the Sleeping Dog, which could only be seen when the tide was low. A good
pilot, they said, could bring a boat home with his eyes closed.

Then came the winter of the great storm. It began on a Tuesday with a warm wind from the south, and nobody thought
much of it. By the evening the wind had turned to the west, the sky was the colour of iron, and eleven boats were
still outside the bay. The families stood on the pier with lanterns, but the snow was so thick that a lantern could
not be seen from twenty steps away. The men in the boats could not see the Widow or the Three Sisters. They could not
see the bow of their own boat. What saved them was a sound. Marta Lind, the schoolteacher, ran to the school and began
to ring the bell that called the children to their lessons. She rang it for nine hours without a rest. When her arms
were too tired, she pulled the rope with the weight of her whole body. The men heard the bell through the snow, and
they steered towards it. Ten of the eleven boats came home that night. The eleventh, the Gull, was found two days
later on the beach of the next valley, broken, but with all her crew alive in a shepherd's hut.

In the spring the people of Sorvik met in the church to talk about what had happened. Some wanted to build a
lighthouse at last. The harbour master, an honest man called Olaf Brenn, stood up and said that a light would not have
helped. In such snow, he said, even the brightest lamp is blind, but a bell can be heard by everybody. So the people
decided to build a bell tower on the rock at the mouth of the bay, high enough that its sound would carry over the
water, and strong enough to stand in any storm. They decided it because a bell had saved their boats, and because they
did not want to depend on one tired woman and a school rope a second time.

The work took four summers. The stone came from the quarry at Hallen, and it was carried over the water on rafts,
because the path along the shore was too steep for wagons. In the first summer they lost two rafts, and with them
almost thirty tons of stone, which still lie at the bottom of the bay. In the second summer a mason from the capital
showed them how to cut the blocks so that each of them locks into its neighbours, without any mortar. In the third
summer there was no money left, and the town sold its only steam crane to pay for food. In the fourth summer the
fishermen gave one fish of every ten to the builders, and by September the tower was finished. It was thirty-one
metres high, and from its top one could see the mountains on the other side of the border.

The bell itself was another story. The foundry in the capital asked for a price that the town could not pay. But the
sister of Marta Lind was married to a clockmaker, and the clockmaker knew of an old bell that nobody wanted. It had
been made for a cathedral, but it had a wrong note, a little too low, and the bishop had refused it. For forty years
it had been standing in a yard behind a brewery. The brewer was glad to be rid of it. He asked for nothing but twelve
barrels of salted herring, and he paid for the transport himself. When the bell was hung in the tower and was rung for
the first time, the people understood why the note was wrong for a cathedral and right for the sea: it was deep and
soft, and it did not seem to come from one place. It filled the bay from shore to shore like water fills a cup.

Ringing the bell by hand was hard work, and so the clockmaker built a machine. A heavy weight was wound up once a day,
and while it sank slowly through the inside of the tower, it moved a hammer. The machine could be set to three
different signals. One stroke every minute meant that the bay was open and the weather was good. Two strokes meant
that there was fog, and that boats should wait outside until it lifted. Three strokes meant danger, and that every
boat should come home at once. The keeper of the tower had to watch the sky and the barometer and choose the signal.
The first keeper was Marta Lind. She left the school to her best pupil, moved into the small room under the bell, and
stayed there for twenty-six years. She kept a book in which she wrote the weather of every day, the signal that she
had chosen, and the name of every boat that passed. The book is now in the museum of the town, and scientists come from
far away to read it, because there is no other record of the weather of that coast that is so long and so careful.

Today the boats of Sorvik have radios and satellites to guide them, and the machine in the tower was replaced by an
electric motor. But the bell is still rung by hand on one day of the year, the day of the great storm. The oldest
fisherman and the youngest pupil of the school pull the rope together, eleven times, once for every boat. Then the
whole town walks down to the pier with lanterns, and they stand there for a while and listen, until the sound has
gone out over the water and nothing is left of it."""


def build_prompt(question: str, count_tokens: Callable[[str], int], wanted_tokens: int | None) -> str:
    """The text and the question, as a user's message. `wanted_tokens`: the text is repeated or cut, sentence by
    sentence, so that the message has about (and never more than) so many tokens, counted by `count_tokens`."""
    if wanted_tokens is None:
        return _message(TEXT, question)
    sentences = re.findall(r"\S.*?(?:[.!?](?=\s|$)|\n\n|\Z)\s*", TEXT, re.DOTALL)
    # Any number of sentences can be asked for; counts grow with it, so the right one is found by halving.
    low, high = 0, 1
    while count_tokens(_message(_first(sentences, high), question)) <= wanted_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(_message(_first(sentences, middle), question)) <= wanted_tokens:
            low = middle
        else:
            high = middle
    return _message(_first(sentences, low), question)


def _first(sentences: list[str], count: int) -> str:
    return "".join(sentences[i % len(sentences)] for i in range(count)).strip()


def _message(text: str, question: str) -> str:
    return f"Read this story.\n\n{text}\n\n{question}"
