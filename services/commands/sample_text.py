"""English for captures and benchmarks, written for this project: the demo's story and three more pieces.

About 2,700 tokens of SmolLM2, none of them twice: text that repeats itself would be predicted from its own context, and
what a lossy codec costs would not show.
"""

from __future__ import annotations

from prfaas.services.commands.demo.prompt import TEXT as STORY

ESSAYS = """\
How Bread Rises

A loaf of bread is mostly air, and the air has to be made on the spot. When flour is mixed with water, two proteins in
it swell and join into long elastic strands, which bakers call gluten. Kneading stretches and folds these strands
until they form thin sheets, and the sheets close around tiny bubbles that were beaten into the dough by chance.
Nothing is ever added to the number of those bubbles afterwards. All that yeast does is to fill them. Yeast is a
fungus of a single cell; it eats the sugar that enzymes cut from the starch, and it gives off carbon dioxide and a
little alcohol. The gas dissolves in the water of the dough first, and only when the water can hold no more does it
begin to push the bubbles apart. That is why a dough seems to sleep for an hour and then doubles within the next one.

Temperature decides how fast this goes, and time decides how the bread will taste. At thirty degrees a dough is ready
before lunch, but it is dull, because the yeast has had no time to make anything except gas. A dough that spends the
night in a cold cellar rises just as high, and meanwhile bacteria have produced acids and dozens of other substances
which give the crust its colour and its smell. Old recipes never mention a thermometer. They say that the dough should
rest until it is as light as a sleeping cat, and that a finger pressed into it should leave a dent which fills slowly.
In the oven the last act takes ten minutes. The gas expands, the alcohol boils, the yeast makes a final effort and
dies at about fifty-five degrees. Then the starch takes up the water, the walls between the bubbles become firm, and
some of them tear, so that steam can leave. If the crust hardens too early, the loaf bursts at its weakest place. For
this reason bakers cut the top with a razor blade and throw a cup of water on the floor of the oven: the cut tells the
bread where it may burst, and the steam keeps its skin soft until it has done so.

The Surveyor's Chain

Before a country can be drawn it has to be measured, and for two centuries it was measured with a chain. Edmund
Gunter, a clergyman who preferred instruments to sermons, proposed one in 1620 that was sixty-six feet long and had a
hundred links. The choice looks odd until one begins to calculate with it. Ten chains make a furlong and eighty make a
mile; a field that is one chain wide and ten chains long is exactly an acre. A surveyor who counted links could
therefore write down decimals and still sell land in acres, and he needed neither a table nor much arithmetic. Two men
carried the chain. The one in front held ten iron pins, and he pushed one into the ground at each full length; the one
behind pulled it out again when he reached it. When all ten pins had changed hands they had walked a furlong, and they
cut a notch into a stick.

The method had enemies. A chain that was dragged through stubble for a summer grew longer, because each of its six
hundred rubbing surfaces lost a little metal. Hot days stretched it and cold mornings shortened it. On a slope it had
to be held level, with a plumb line hanging from the higher end, and in a wood it went around the trees unless
somebody cut them down. Careful surveyors kept a second chain in a box, used it for nothing but comparison, and wrote
the difference into their book every Monday. Careless ones bought a new chain when the old one broke. One can still
find the careless ones today: where two districts were measured by different men, the roads of one often miss the
roads of the other by the width of a house, and the maps show a small, meaningless bend at the boundary.

Steel tapes replaced the chain, light beams replaced the tapes, and now a receiver on a pole listens to satellites and
gives a position in a few seconds. But the units have stayed behind like furniture in a house that was sold. A cricket
pitch is one chain long. Streets in many towns of the new world are one chain wide, and the blocks between them are
five or ten. Nobody who walks there thinks of Gunter, and yet every step is taken on his grid.

A Letter about Moving the Library

Dear Hanna, you asked how we moved forty thousand books across the river in a week, and whether I would do it the same
way again. The short answer is no. The long answer begins with the shelves. The new building has more of them than the
old one, but they are lower, so the order of the books could not simply be kept: whatever stood on the top row of the
old shelves had no place to go. Peter made a plan in which every section grew by a fifth, except law, which nobody
reads, and travel, which everybody takes home. He wrote the number of the new shelf on a strip of paper and put one
strip into each box. It was a good plan. What he had not thought of was that boxes are packed from the left and
unpacked from the top, so that each box came out in the opposite order, and on the first evening we had eleven hundred
books standing backwards.

On the second day we changed three things. First, every box got two strips, one for its first book and one for its
last. Second, we stopped sending full vans. A full van took an hour to unload, and during this hour twelve people at
the old building had nothing to do; a van that was a third full came back so quickly that both sides were always busy,
and we finished more boxes by noon than on the whole day before. Third, we asked the readers for help. They made a
line across the footbridge, two hundred of them, and passed the children's books from hand to hand. It was slower than
the van, and several picture books were read on the way, but nothing was lost, and since that morning there are people
in this town who speak of the library as if they had built it.

If I had to do it again, I would begin with the smallest section, not with the largest. Mistakes that are made with
two hundred books about gardening can be put right in an afternoon. I would also write down who has which key. On the
last night the caretaker was the only person who could open the lift, and the caretaker had gone to his sister's
wedding with all the keys in the pocket of his good coat. We carried the encyclopedias up the stairs. Your friend,
Ruth
"""

TEXT = f"{STORY}\n\n{ESSAYS}"
