"""English words that get a token of their own (`tokenizer_build`). Our own list, common words first."""

_COMMON = """
the of and to in that is was he for it with as his on be at by had not are but from or have an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many off before must well back through years much where your way down should because long each
just those people take day good how himself here too little very while might great this us am upon shall hath thou
thee thy thine doth yet nor come let know sir lord king love ay oh yes make go see give think tell speak hear look
say stand hold never ever every both why whose whom still own being against though death life heart hand eyes
father mother son lady queen men night fair true sweet most dear poor noble god heaven world art wilt shalt hast
tis twas dost does hither thither ere bid heard comes thats whats madam further speech conscience comfort beseech
ill since therefore john henry mary james william thomas george robert london england france rome english american
monday tuesday wednesday thursday friday saturday sunday january february march april june july august september
october november december computer data file code function return string value user error server request token
duke prince master mistress enter exit exeunt scene act pray farewell unto till none
"""

_ORDINARY = """
a i able accept account across action add affair afraid again age ago air alas allow almost alone along already
although always among anger angel another answer anything appear apply area arm army arrive article ask attack
attempt aunt autumn awake away baby bad bag ball band bank bar base battle bear beast beat beauty become bed begin
behind behold believe bell belong below beneath beside best better between beyond big bird bit bite black blame
bless blind blood blow blue board boat body bold bond bone book born bosom bound bow box boy brain branch brave bread
break breast breath brief bright bring broad broken brother brought brow brown build burn bury business busy buy call
came camp cannot captain car card care carry case cast castle cat catch cause cease cell centre certain chair chamber
chance change charge charm chase check cheek cheer child children choice choose church circle city claim class
clean clear climb clock close cloth cloud coat cold colour command common company compare complete condition
consent consider contain content continue control cook cool copy corn corner cost council count country couple courage
course court cousin cover cow craft create creature credit crime cross crowd crown cruel cry cup cure curse custom
cut daily damn dance danger dare dark daughter dead deal death debt deed deep deny depart desire despair destroy devil
devise did die differ difficult dinner dire direct discover disease dish dismiss distance divide divine doctor dog
done door double doubt draw dread dream dress drink drive drop drown dry due dull during duty dwell each eager ear
early earth ease east easy eat edge effect eight either else embrace empire empty end enemy energy enforce engine
english enjoy enough ensue envy equal escape estate eternal evening event everyone evil example except excuse exercise
expect experience express eye face fact fail faint faith fall false fame family famous fancy far farm fashion fast
fate father fault favour fear feast feed feel fell fellow felt fetch few field fierce fifty fight figure fill find
fine finger finish fire fish fit five fix flame flat flatter flesh flight floor flow flower fly foe follow folly fond
food fool foot force foreign forest forget forgive form former forth fortune forty forward foul found four free french
fresh friend front fruit full fury future gain game garden garment gate gather gave general gentle gentleman get ghost
gift girl given glad glass glory gods goes gold gone got govern grace gracious grand grant grass grave gray green
greet grief ground group grow growth guard guess guest guide guilt gun habit hair half hall hands hang happen happy
hard harm haste hat hate head health heat heavy heir held hell help hence herself hide high hill hit home honest
honour hope horn horse host hot hour house however huge human humble hundred hunt hurt husband ice idea idle ill
image imagine include increase indeed industry infant inform ink inside instance instead intend interest inward iron
island issue itself jealous jest jewel join journey joy judge just justice keen keep kept key kill kind kingdom kiss
knave knee knew knife knight knock knowledge known labour lack laid lament land language large last late laugh law
lay lead leaf learn least leave led left leg lend length less lesson letter level liberty lie lift light likely limb
limit line lion lip list listen live liver load lock lodge lofty loose lords lose loss lost lot loud low loyal lust
machine mad maid main majesty malice manner march mark market marriage marry mass match material matter mean meaning
measure meat meet member memory mend merchant mercy merry message metal method middle midst mighty mile milk mind
mine minute miss mock model modern modest moment money month monster moon moral morning mortal mouth move mud murder
music myself name narrow nation nature near necessary neck need neither net new news next nice nine nobody noise
north nose note nothing notice nought number nurse oath obey object observe occasion ocean odd offence offend offer
office officer often oil old once onward open opinion oppose order ordinary otherwise ought ourselves outside owe
page pain paint pair pale palace paper pardon parent park part particular party pass passion past path patience pay
peace people perceive perfect perform perhaps period perish permit person physic picture piece pierce pity place
plague plain plan plant plate play please pleasure plenty plot pluck point poison political poor port position
possess possible post pound power practice praise prayer precious prepare presence present preserve press pretty
prevent price pride priest print prison private prize problem proceed process produce profess promise proof proper
protect proud prove provide public pull punish pure purge purpose purse pursue push put quality quarrel question
quick quiet quit quite rage rain raise ran range rank rare rash rate rather reach read ready real reason receive
record red redeem reduce refuse regard reign relate remain remember remove repent reply report request require respect
rest result return revenge reverence revolt reward rich ride right ring rise river road roar rob rock rogue roll
room root rose rotten rough round royal rude ruin rule run sacred sacrifice sad safe safety sail saint sake same
sand sanguine save saw scale scarce school scope score scorn scorned sea search season seat second secret secure seed
seek seem seen seize self sell send sense sent sentence separate serpent servant serve service set settle seven
several severe shadow shake shallow shame shape share sharp shed sheep shine ship shirt shore short shot shoulder
shout show shut sick side siege sigh sight sign silence silent silver simple since sing single sink sister sit six
size skill skin sky slander slave slay sleep slight slip slow small smell smile smooth snow social society soft soil
soldier sole solemn solid someone something sometimes song soon sorrow sort soul sound south sovereign space spare
spend spent spirit spite spoil spoke sport spot spread spring spur square staff stage stain stamp standard star stare
start state station stay steal steel step stick stir stomach stone stood stop store storm story straight strange
stranger stream street strength stretch strike string strive stroke strong struck student study stuff subject substance
success sudden suffer sugar suit summer sun supper supply support suppose sure surface surprise swear sweat sweep swell
swift swim sword system table tail taken talk tall tame task taste taught teach tear teeth tempest temple tempt ten
tender term test thank thanks themselves therefore thereof thick thief thin thing things thirty thought thousand threat
three threw throat throne throng throw thunder thus tie tide tired title today together tomb tomorrow tongue tonight
took top torment torture total touch toward towards tower town trade train traitor travel treason treasure treat tree
tremble trial tribute trick trip triumph troop trouble trust truth try turn twelve twenty twice type tyrant
uncle under understand unhappy union unite unity universe unless unlike unworthy urge use usual vain valiant valley
value vantage various vault vengeance venture verse vessel view vile villain virtue virgin visit voice vow wage wait
wake walk wall wander want wanton war ward warm warn warrant wash waste watch water wave weak wealth weapon wear
weary weather weed week weep weigh weight welcome went west wet wheel whence whereof wherefore whether white whole
wicked wide widow wife wild willing win wind window wine wing winter wisdom wise wish wit witch within without
witness woe wolf woman women wonder wood word work worm worse worship worst worth worthy wound wrath wreck wretch
write written wrong wrote year yellow yesterday yield yonder young yours yourself youth
"""

COMMON_WORDS = tuple(dict.fromkeys(_COMMON.split()))
WORDS = tuple(dict.fromkeys(_ORDINARY.split()))
