"""Common short English words, each a single token with its leading space in the usual byte-pair vocabularies."""

from __future__ import annotations

LIST = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so said what up its about into than
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many must before back see through way where get much go well your know should down work year
because come people just say each those take day good how long little use own since great old place still life live
world house part right small another hand again same high while found every three set point end think late head last
number men along both water side form night line city name white left big light four state might next food keep never
under book begin open seem together got group often run important until children feet car mile walk sea grow took
river carry second enough plain girl usual young ready above ever red list though feel talk bird soon body dog family
direct pose leave song door black short class wind question happen complete ship area half rock order fire south
problem piece told knew pass top whole king space heard best hour better true hundred five remember step early hold
west ground interest reach fast sing listen six table travel less morning ten simple several toward war lay against
pattern slow center love person money serve appear road map rain rule govern pull cold notice voice power town fine
certain fly fall lead cry dark machine note wait plan figure star box field rest correct able done beauty drive stood
contain front teach week final gave green quick develop ocean warm free minute strong special mind behind clear tail
produce fact street nothing course stay wheel full force blue object decide surface deep moon island foot system busy
test record boat common gold possible plane dry wonder thousand ago ran check game shape hot miss brought heat snow
bring yes distant fill east paint language among
"""
WORDS: tuple[str, ...] = tuple(LIST.split())
